// Mixtures of adapters of any ranks: h = g (A x), and what the product with B adds to the base's.
//
// Tokens are taken in blocks of 32. A block meets the adapters that one of its tokens may need, and no others: a
// prefill touches the rows of its own mix, a decoding batch those of everybody. Gates stand in float32; the gated
// intermediate is rounded once, to bfloat16, and the result once, together with the base's product.
//
// An adapter's rows in one module of rank r (`Page`):
//   a  strips of up to 16 ranks, the last as wide as what is left (w): [d_in / 32][16 pairs][w][2]
//   b  [d_out / 16][ceil(r / 2) pairs][16 columns][2], an odd last rank paired with zeros
// Both are read as they lie, and no rank is filled up. 64 bytes behind `a` can be read: a strip that is less than 16
// wide is read as if it were, and what comes out of the other columns is dropped.
#pragma once

#include <cmath>
#include <vector>

#include "common.h"

namespace lorafleet {

struct Page {
    const bf16* a;
    const bf16* b;
    const bf16* gate;  // [d_in] or null; on the page of the adapter's first module in a group
    int64_t rank;      // 0: the adapter does not change the module
};

// The gates of one step. K adapters are active.
struct Mixture {
    const Page* pages;              // [K][all modules]
    int64_t modules;                // of the whole model
    int64_t adapters;               // K
    const float* gates;             // [T][K]; of routed tokens zeros
    const int32_t* block_starts;    // [blocks + 1], into block_adapters
    const int32_t* block_adapters;  // ascending inside a block
    const uint8_t* eligible;        // [T][K], for routed tokens; null where no token is routed
    const int32_t* top_k;           // [T], 0 where a token is not routed
    const float* temperature;       // [T]
};

// What one adapter adds to one block: the columns of the block's intermediate for a module.
struct Part {
    const Page* page;
    int32_t adapter;  // column of the gates
    int32_t column;   // first of its columns; each part is rounded up to two
};

// The intermediate of one block and one module: [32 tokens][columns], columns filled up with zeros to 32.
struct Intermediate {
    int32_t first_part, parts;
    int32_t columns;
    size_t offset;  // in elements, into the buffer
};

// Which parts every block and module of a group has. Made by each thread for itself: it costs less than waiting.
class Layout {
  public:
    // `gates [T][K]` are the final ones: an adapter that no token of a block chose has no part there.
    void build(const Mixture& mixture, const float* gates, int first_module, int modules, int64_t tokens) {
        modules_ = modules;
        parts_.clear();
        intermediates_.clear();
        size_ = 0;
        const int64_t blocks = divide_up(tokens, BLOCK_ROWS);
        for (int64_t block = 0; block < blocks; ++block) {
            used_.clear();
            for (int32_t i = mixture.block_starts[block]; i < mixture.block_starts[block + 1]; ++i) {
                const int32_t adapter = mixture.block_adapters[i];
                if (!mixture.eligible || any_open(gates, mixture.adapters, adapter, block, tokens))
                    used_.push_back(adapter);
            }
            for (int module = 0; module < modules; ++module) {
                Intermediate made{int32_t(parts_.size()), 0, 0, size_};
                for (int32_t adapter : used_) {
                    const Page* page = mixture.pages + adapter * mixture.modules + first_module + module;
                    if (page->rank == 0) continue;
                    parts_.push_back({page, adapter, made.columns});
                    made.columns += int32_t(2 * divide_up(page->rank, 2));
                    ++made.parts;
                }
                size_ += size_t(BLOCK_ROWS) * size_t(filled(made.columns));
                intermediates_.push_back(made);
            }
        }
    }

    const Intermediate& of(int64_t block, int module) const { return intermediates_[size_t(block * modules_ + module)]; }
    const Part* parts(const Intermediate& of) const { return parts_.data() + of.first_part; }
    size_t size() const { return size_; }
    bool empty() const { return parts_.empty(); }
    static int64_t filled(int64_t columns) { return divide_up(columns, TILE_K) * TILE_K; }

    // Whether two blocks have the same parts in a module, so that rows gathered for one serve the other.
    bool equal(int64_t block, int64_t other, int module) const {
        const Intermediate &a = of(block, module), &b = of(other, module);
        if (a.parts != b.parts) return false;
        for (int32_t i = 0; i < a.parts; ++i)
            if (parts_[size_t(a.first_part + i)].page != parts_[size_t(b.first_part + i)].page) return false;
        return true;
    }

  private:
    static bool any_open(const float* gates, int64_t adapters, int32_t adapter, int64_t block, int64_t tokens) {
        const int64_t stop = (block + 1) * BLOCK_ROWS < tokens ? (block + 1) * BLOCK_ROWS : tokens;
        for (int64_t token = block * BLOCK_ROWS; token < stop; ++token)
            if (gates[token * adapters + adapter] != 0.0f) return true;
        return false;
    }

    int modules_ = 0;
    size_t size_ = 0;
    std::vector<Part> parts_;
    std::vector<Intermediate> intermediates_;
    std::vector<int32_t> used_;
};

// The gates of the tokens [first, last), routed ones computed from their logits: the softmax of the top_k largest of
// the eligible adapters' v . x / temperature (Mixtral, arXiv 2401.04088, section 2.1). Equal logits count in the order
// of their columns. `x` begins at token 0.
inline void token_gates(const Mixture& mixture, int first_module, int modules, const bf16* x, int64_t x_stride, int k,
                        int64_t first, int64_t last, float* gates) {
    struct Candidate {
        float logit;
        int32_t adapter;
    };
    std::vector<Candidate> candidates;
    for (int64_t token = first; token < last; ++token) {
        float* row = gates + token * mixture.adapters;
        std::memcpy(row, mixture.gates + token * mixture.adapters, size_t(mixture.adapters) * sizeof(float));
        if (mixture.top_k[token] == 0) continue;
        candidates.clear();
        const int64_t block = token / BLOCK_ROWS;
        for (int32_t i = mixture.block_starts[block]; i < mixture.block_starts[block + 1]; ++i) {
            const int32_t adapter = mixture.block_adapters[i];
            if (!mixture.eligible[token * mixture.adapters + adapter]) continue;
            const Page* pages = mixture.pages + adapter * mixture.modules + first_module;
            const bf16* gate = nullptr;
            for (int module = 0; module < modules && !gate; ++module) gate = pages[module].gate;
            if (!gate) continue;  // no rows here
            __m512 sum = _mm512_setzero_ps();
            for (int at = 0; at < k; at += 32)
                sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(x + token * x_stride + at),
                                       (__m512bh)_mm512_loadu_si512(gate + at));
            candidates.push_back({_mm512_reduce_add_ps(sum), adapter});
        }
        const size_t count = candidates.size() < size_t(mixture.top_k[token]) ? candidates.size()
                                                                             : size_t(mixture.top_k[token]);
        float total = 0.0f;
        for (size_t place = 0; place < count; ++place) {
            size_t best = place;
            for (size_t i = place + 1; i < candidates.size(); ++i)
                if (candidates[i].logit > candidates[best].logit) best = i;
            const Candidate chosen = candidates[best];
            // Moved up one by one: those that stay keep the order of their columns.
            for (size_t i = best; i > place; --i) candidates[i] = candidates[i - 1];
            candidates[place] = chosen;
            row[chosen.adapter] = std::exp((chosen.logit - candidates[0].logit) / mixture.temperature[token]);
            total += row[chosen.adapter];
        }
        for (size_t place = 0; place < count; ++place) row[candidates[place].adapter] /= total;
    }
}

// A strip of up to 16 ranks of one part.
struct Strip {
    const bf16* a;
    bf16* h;           // where its columns begin in the block's first row
    int64_t h_stride;  // between rows
    int32_t adapter, width;
    int32_t stored;    // the width, and the zero beside an odd last rank
    int64_t block;
};

// All strips of a group, in order of block, module and adapter.
inline void list_strips(const Layout& layout, int modules, int64_t tokens, int k, bf16* h, std::vector<Strip>& strips) {
    strips.clear();
    const int64_t blocks = divide_up(tokens, BLOCK_ROWS);
    for (int64_t block = 0; block < blocks; ++block)
        for (int module = 0; module < modules; ++module) {
            const Intermediate& made = layout.of(block, module);
            const int64_t stride = Layout::filled(made.columns);
            const Part* parts = layout.parts(made);
            for (int32_t i = 0; i < made.parts; ++i) {
                const Page& page = *parts[i].page;
                for (int64_t rank = 0; rank < page.rank; rank += TILE_ROWS) {
                    const int32_t width = int32_t(page.rank - rank < TILE_ROWS ? page.rank - rank : TILE_ROWS);
                    strips.push_back({page.a + rank * k, h + made.offset + parts[i].column + rank, stride,
                                      parts[i].adapter, width, int32_t(2 * divide_up(width, 2)), block});
                }
            }
        }
}

// Zeros in the columns that fill an intermediate up. Of `rows` rows.
inline void clear_rest(const Layout& layout, int64_t block, int module, int rows, bf16* h) {
    const Intermediate& made = layout.of(block, module);
    const int64_t stride = Layout::filled(made.columns);
    if (stride == made.columns) return;
    for (int row = 0; row < rows; ++row)
        std::memset(h + made.offset + row * stride + made.columns, 0, size_t(stride - made.columns) * sizeof(bf16));
}

// Gates and rounds what the tiles gave for one strip. A closed gate writes zeros: an adapter whose intermediate
// overflows must not turn its neighbours' zeros into NaN.
inline void write_strip(const Strip& strip, const float* c, const float* gates, int64_t adapters, int rows) {
    const __mmask16 lanes = first_lanes(strip.width), stored = first_lanes(strip.stored);
    const float* gate = gates + strip.block * BLOCK_ROWS * adapters + strip.adapter;
    for (int row = 0; row < rows; ++row) {
        const float g = gate[row * adapters];
        const __m512 v = g == 0.0f ? _mm512_setzero_ps()
                                   : _mm512_maskz_mul_ps(lanes, _mm512_load_ps(c + row * 16), _mm512_set1_ps(g));
        store16(strip.h + row * strip.h_stride, v, stored);
    }
}

// The intermediates of one strip, or of two of the same block at once, whose tokens are read once then. The tiles are
// set for `rows`.
inline void shrink(const bf16* x, int64_t x_stride, int k, const Strip& one, const Strip* other, const float* gates,
                   int64_t adapters, int rows) {
    alignas(64) float c[2][BLOCK_ROWS * 16];
    const bf16* upper = x + one.block * BLOCK_ROWS * x_stride;
    const bf16* lower = upper + TILE_ROWS * x_stride;
    const size_t stride = size_t(x_stride) * sizeof(bf16);
    const bool two_rows = rows > TILE_ROWS;
    const bf16 *a = one.a, *b = other ? other->a : nullptr;
    const size_t a_stride = size_t(one.width) * 4, b_stride = other ? size_t(other->width) * 4 : 0;
    const size_t a_step = size_t(one.width) * TILE_K, b_step = other ? size_t(other->width) * TILE_K : 0;
    constexpr int AHEAD = 2048;  // bytes; the next strips of an adapter mostly follow
    fence();
    _tile_zero(0);
    if (two_rows) _tile_zero(1);
    if (other) {
        _tile_zero(2);
        if (two_rows) _tile_zero(3);
    }
    for (int i = 0; i < k; i += TILE_K, a += a_step, b += b_step) {
        for (size_t line = 0; line < a_step * sizeof(bf16); line += 64)
            _mm_prefetch((const char*)a + AHEAD + line, _MM_HINT_T0);
        for (size_t line = 0; line < b_step * sizeof(bf16); line += 64)
            _mm_prefetch((const char*)b + AHEAD + line, _MM_HINT_T0);
        _tile_loadd(4, upper + i, stride);
        if (two_rows) _tile_loadd(5, lower + i, stride);
        _tile_loadd(6, a, a_stride);
        _tile_dpbf16ps(0, 4, 6);
        if (two_rows) _tile_dpbf16ps(1, 5, 6);
        if (other) {
            _tile_loadd(7, b, b_stride);
            _tile_dpbf16ps(2, 4, 7);
            if (two_rows) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c[0], 64);
    if (two_rows) _tile_stored(1, c[0] + 256, 64);
    write_strip(one, c[0], gates, adapters, rows);
    if (other) {
        _tile_stored(2, c[1], 64);
        if (two_rows) _tile_stored(3, c[1] + 256, 64);
        write_strip(*other, c[1], gates, adapters, rows);
    }
}

// The rows of B of a block's parts for 16 columns (a unit) of a module, one below the other as tiles, rest zero.
inline void gather_unit(const Part* parts, int32_t count, int64_t columns, int64_t unit, int64_t ahead, char* to) {
    char* const start = to;
    for (int32_t i = 0; i < count; ++i) {
        const int64_t pairs = divide_up(parts[i].page->rank, 2);
        const char* from = (const char*)(parts[i].page->b + unit * pairs * 32);
        for (int64_t pair = 0; pair < pairs; ++pair, from += 64, to += 64) {
            _mm_prefetch(from + ahead * pairs * 64, _MM_HINT_T0);
            _mm512_store_si512(to, _mm512_loadu_si512(from));
        }
    }
    const size_t wanted = size_t(Layout::filled(columns)) / 2 * 64;
    std::memset(to, 0, wanted - size_t(to - start));
}

}  // namespace lorafleet
