// Attention of one packed step over keys and values in pages, in bfloat16, on the matrix unit.
//
// Legend: P = 32 tokens of a page, D head size (a multiple of 32), H query heads, K key/value heads, G = H / K.
//
//   keys   of a (page, head)  [D/2][P][2]   two elements of a token side by side
//   values of a (page, head)  [P/2][D][2]   two tokens of an element side by side
//
// Both are what the matrix unit takes as B, as they lie. A stands for rows: row r of a span is query head r % G of
// token r / G, so that the heads which share keys and values share each read of them, and a decoding token's G rows
// are computed like any other. Up to 32 rows go through the sequence's pages, 8 at a time, with the softmax of online
// normalisation (arXiv 1805.02867, algorithm 3) in base 2.
//
// What a token gets does not depend on the threads, nor on the step's other sequences, to the bit: groups of pages, and
// the parts that a long sequence is cut into, begin at fixed places of the sequence. A sequence is cut for a token that
// is alone in its step, and not for a chunk: beyond 512 tokens a prompt that is cut elsewhere differs by rounding.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "common.h"

namespace lorafleet {
namespace {

constexpr int PAGE = PAGE_TOKENS;
constexpr int GROUP = 8;                              // pages whose scores are held at once: 35 kB of 48 in L1
constexpr int PART = 16;                              // pages of a decoding sequence that are one item of work
constexpr int SCORE_STRIDE = GROUP * PAGE + 16;       // floats; not a power of two, or rows share few sets of the cache
static_assert(PART % GROUP == 0, "a part begins with a group");
constexpr int SMALL_COST = 3, LARGE_COST = 8;         // of a page for up to 16 rows, and for up to 32
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// ---- what a step looks like --------------------------------------------------------------------------------------

// Tokens [start, stop) of a sequence; its pages are tables[table...], its tokens rows first_token... of the step.
struct Span {
    int64_t start, stop, table, first_token;
    bool writes_itself;  // one token: whoever attends it stores its keys and values, on lines that it reads anyway
};

// Rows [first_row, first_row + rows) of a span for one key/value head, over pages [first_page, stop_page).
struct Item {
    int32_t span, head, first_row, rows, first_page, stop_page;
    int32_t split;  // which of the plan's splits this is a part of, or -1
    int32_t part;
    int64_t cost;
};

// An item that was cut into parts: its results before normalisation lie at parts[first...].
struct Split {
    int32_t first, parts;
};

// A page of a span of several tokens, to be filled before anybody reads.
struct Write {
    int32_t span, page;
};

struct Plan {
    int head_dim, heads, kv_heads, group;
    std::vector<int32_t> tables;
    std::vector<Span> spans;
    std::vector<Item> items;
    std::vector<Split> splits;
    std::vector<Write> writes;
    int32_t parts = 0;
    std::vector<std::atomic<int32_t>> unfinished;  // parts of each split, in the call under way
};

// One layer of a step. Strides in elements; the D elements of a head lie side by side. Mirrored in tile_attention.py.
struct Call {
    const bf16 *query, *key, *value;
    bf16* out;
    bf16 *keys, *values;              // this layer's pages
    const bf16 *cos, *sin;            // [T, D], or null: nothing is rotated
    const bf16 *query_norm, *key_norm;  // [D], or null: not normalised
    int64_t query_row, query_head, key_row, key_head, value_row, value_head, out_row;
    int64_t window;                   // a token sees itself and the window - 1 before it; 0: all
    float scale, softcap, epsilon;    // softcap 0: none
    int32_t threads;
};

// ---- tiles -------------------------------------------------------------------------------------------------------

// Up to 16 rows: results 0 to 3, A in 4, B in 5 to 7. More: results 0 to 3 as two by two, A in 4 and 5, B in 6 and 7.
class RowTiles {
  public:
    ~RowTiles() {
        if (rows_) _tile_release();
    }

    void set(int rows) {
        if (rows == rows_) return;
        rows_ = rows;
        const int upper = std::min(rows, TILE_ROWS), lower = rows - upper;
        const int few[8] = {rows, rows, rows, rows, rows, 16, 16, 16};
        const int many[8] = {upper, lower, upper, lower, upper, lower, 16, 16};
        TileConfig config;
        for (int i = 0; i < 8; ++i) {
            config.rows[i] = uint8_t(lower ? many[i] : few[i]);
            config.column_bytes[i] = 64;
        }
        configure(config);
    }

  private:
    int rows_ = 0;
};

// ---- rows of queries and keys ------------------------------------------------------------------------------------

// One head of one token, normalised (RMSNorm, arXiv 1910.07467) and rotated (arXiv 2104.09864, eq. 34; element i turns
// with element i + D/2) where asked, in float32, rounded once.
void turn(const bf16* x, bf16* y, int size, const bf16* norm, float epsilon, const bf16* cos, const bf16* sin) {
    if (!norm && !cos) {
        std::memcpy(y, x, size_t(size) * sizeof(bf16));
        return;
    }
    const int half = size / 2;
    __m512 scale = _mm512_set1_ps(1.0f);
    if (norm) {
        __m512 sum = _mm512_setzero_ps();
        for (int i = 0; i < size; i += 16) {
            const __m512 v = load16(x + i);
            sum = _mm512_fmadd_ps(v, v, sum);
        }
        scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / float(size) + epsilon));
    }
    for (int i = 0; i < half; i += 16) {
        __m512 a = load16(x + i), b = load16(x + half + i);
        if (norm) {
            a = _mm512_mul_ps(_mm512_mul_ps(a, scale), load16(norm + i));
            b = _mm512_mul_ps(_mm512_mul_ps(b, scale), load16(norm + half + i));
        }
        if (cos) {
            const __m512 turned = _mm512_fnmadd_ps(b, load16(sin + i), _mm512_mul_ps(a, load16(cos + i)));
            b = _mm512_fmadd_ps(a, load16(sin + half + i), _mm512_mul_ps(b, load16(cos + half + i)));
            a = turned;
        }
        store16(y + i, a);
        store16(y + half + i, b);
    }
}

void turned_key(const Plan& plan, const Call& call, int64_t token, int head, bf16* y) {
    const int64_t at = token * plan.head_dim;
    turn(
        call.key + token * call.key_row + head * call.key_head, y, plan.head_dim, call.key_norm, call.epsilon,
        call.cos ? call.cos + at : nullptr, call.sin ? call.sin + at : nullptr);
}

// Rows of A: [rows, D].
void turned_queries(const Plan& plan, const Call& call, const Span& span, const Item& item, bf16* y) {
    const int size = plan.head_dim;
    int64_t token = span.first_token + item.first_row / plan.group;
    int of_group = item.first_row % plan.group;
    for (int r = 0; r < item.rows; ++r) {
        const int64_t head = int64_t(item.head) * plan.group + of_group;
        turn(
            call.query + token * call.query_row + head * call.query_head, y + int64_t(r) * size, size, call.query_norm,
            call.epsilon, call.cos ? call.cos + token * size : nullptr, call.sin ? call.sin + token * size : nullptr);
        if (++of_group == plan.group) {
            of_group = 0;
            ++token;
        }
    }
}

// ---- into pages --------------------------------------------------------------------------------------------------

// 16 rows of 16 numbers, in place; four rounds of exchanges, of 1, 2, 4 and 8 columns.
inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // r[4 a + c] now holds, in its lane l of four numbers, column 4 l + c of rows 4 a to 4 a + 3.
    for (int c = 0; c < 4; ++c) {
        const __m512i even_low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        t[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// One token's key, [D], to its place in a page.
void store_key(const bf16* key, bf16* page, int offset, int size) {
    for (int pair = 0; pair < size / 2; ++pair) {
        std::memcpy(page + int64_t(pair) * PAGE * 2 + offset * 2, key + pair * 2, 2 * sizeof(bf16));
    }
}

// Keys [P, D], of which those of `held` tokens count, into a page.
void store_keys(const bf16* keys, bf16* page, uint32_t held, int size) {
    for (int half = 0; half < 2; ++half) {
        const __mmask16 lanes = __mmask16(held >> (16 * half));
        if (!lanes) continue;
        for (int d = 0; d < size; d += 32) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(keys + int64_t(16 * half + i) * size + d);
            transpose16(r);
            bf16* to = page + int64_t(d / 2) * PAGE * 2 + half * 32;
            for (int pair = 0; pair < 16; ++pair) _mm512_mask_storeu_epi32(to + pair * PAGE * 2, lanes, r[pair]);
        }
    }
}

// Values of neighbouring tokens, `stride` apart, into a page from `offset` on.
void store_values(const bf16* values, int64_t stride, int tokens, bf16* page, int offset, int size) {
    for (int t = 0; t < tokens;) {
        const bool odd = (offset + t) % 2, both = !odd && t + 1 < tokens;
        const bf16* from = values + t * stride;
        bf16* to = page + int64_t((offset + t) / 2) * size * 2;
        for (int i = 0; i < size; i += 16) {
            __m512i pair = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + i)));
            if (both) {
                const __m512i next = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + stride + i)));
                _mm512_storeu_si512(to + 2 * i, _mm512_or_si512(pair, _mm512_slli_epi32(next, 16)));
            } else {
                if (odd) pair = _mm512_slli_epi32(pair, 16);
                _mm512_mask_storeu_epi16(to + 2 * i, odd ? 0xaaaaaaaau : 0x55555555u, pair);
            }
        }
        t += both ? 2 : 1;
    }
}

// Zeros behind the first tokens of a page that a sequence begins: a NaN that the page's last owner left would spread
// through a share of zero. Keys need none, as scores that nobody sees are overwritten.
void clear_values(bf16* page, int tokens, int size) {
    const int64_t written = int64_t(tokens / 2) * size * 2;
    std::memset(page + written, 0, size_t(int64_t(PAGE) * size - written) * sizeof(bf16));
}

inline int64_t page_at(const Plan& plan, const Span& span, int64_t page, int head) {
    return (int64_t(plan.tables[span.table + page]) * plan.kv_heads + head) * PAGE * plan.head_dim;
}

// What a span adds to one of its pages; `rows [P, D]` is room to work in.
void fill_page(const Plan& plan, const Call& call, const Write& write, int head, bf16* rows) {
    const Span& span = plan.spans[write.span];
    const int64_t first = std::max(span.start, int64_t(write.page) * PAGE);
    const int64_t stop = std::min(span.stop, int64_t(write.page + 1) * PAGE);
    const int offset = int(first % PAGE), tokens = int(stop - first), size = plan.head_dim;
    const int64_t token = span.first_token + first - span.start, at = page_at(plan, span, write.page, head);
    for (int t = 0; t < tokens; ++t) turned_key(plan, call, token + t, head, rows + int64_t(offset + t) * size);
    store_keys(rows, call.keys + at, uint32_t(((uint64_t(1) << tokens) - 1) << offset), size);
    const bf16* values = call.value + token * call.value_row + head * call.value_head;
    if (offset == 0) clear_values(call.values + at, tokens, size);
    store_values(values, call.value_row, tokens, call.values + at, offset, size);
}

void write_token(const Plan& plan, const Call& call, const Span& span, int head, bf16* row) {
    const int offset = int(span.start % PAGE);
    const int64_t at = page_at(plan, span, span.start / PAGE, head);
    turned_key(plan, call, span.first_token, head, row);
    store_key(row, call.keys + at, offset, plan.head_dim);
    const bf16* value = call.value + span.first_token * call.value_row + head * call.value_head;
    if (offset == 0) clear_values(call.values + at, 0, plan.head_dim);
    store_values(value, call.value_row, 1, call.values + at, offset, plan.head_dim);
}

// ---- one block of rows -------------------------------------------------------------------------------------------

// A thread's own memory. Scores of a group of pages become, in place, their shares: row r begins at
// scores + r · stride, as floats first and as bfloat16 then.
struct Worker {
    bf16* queries;    // [32, D], or keys on their way into a page
    float* scores;    // [32, SCORE_STRIDE]
    float* out;       // [32, D], not yet divided by the sums
    float* sums;      // [32, 16], to be added up
    float* highest;   // [32]
    float* factors;   // [32], by which what was summed so far is multiplied

    static size_t bytes(int size) {
        const size_t wanted = size_t(BLOCK_ROWS) * (size * 6 + SCORE_STRIDE * 4 + 64 + 8);
        return (wanted + 4095) & ~size_t(4095);
    }

    Worker(void* memory, int size) {
        out = static_cast<float*>(memory);
        scores = out + BLOCK_ROWS * size;
        sums = scores + BLOCK_ROWS * SCORE_STRIDE;
        highest = sums + BLOCK_ROWS * 16;
        factors = highest + BLOCK_ROWS;
        queries = reinterpret_cast<bf16*>(factors + BLOCK_ROWS);
    }
};

constexpr int SCORE_BYTES = SCORE_STRIDE * sizeof(float), PAIR_BYTES = PAGE * 2 * sizeof(bf16);

void scores_few(const bf16* queries, int size, const bf16* const* keys, int pages, float* scores) {
    fence();
    for (int i = 0; i < pages; i += 2) {
        const bool both = i + 1 < pages;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int d = 0; d < size; d += 32) {
            const bf16* b = keys[i] + d * PAGE;
            _tile_loadd(4, queries + d, size * sizeof(bf16));
            _tile_loadd(5, b, PAIR_BYTES);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, b + 32, PAIR_BYTES);
            _tile_dpbf16ps(1, 4, 6);
            if (both) {
                b = keys[i + 1] + d * PAGE;
                _tile_loadd(7, b, PAIR_BYTES);
                _tile_dpbf16ps(2, 4, 7);
                _tile_loadd(5, b + 32, PAIR_BYTES);
                _tile_dpbf16ps(3, 4, 5);
            }
        }
        float* to = scores + i * PAGE;
        _tile_stored(0, to, SCORE_BYTES);
        _tile_stored(1, to + 16, SCORE_BYTES);
        if (both) {
            _tile_stored(2, to + 32, SCORE_BYTES);
            _tile_stored(3, to + 48, SCORE_BYTES);
        }
    }
}

void scores_many(const bf16* queries, int size, const bf16* const* keys, int pages, float* scores) {
    fence();
    const bf16* lower = queries + 16 * size;
    for (int i = 0; i < pages; ++i) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int d = 0; d < size; d += 32) {
            const bf16* b = keys[i] + d * PAGE;
            _tile_loadd(4, queries + d, size * sizeof(bf16));
            _tile_loadd(6, b, PAIR_BYTES);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, lower + d, size * sizeof(bf16));
            _tile_dpbf16ps(1, 5, 6);
            _tile_loadd(7, b + 32, PAIR_BYTES);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        float* to = scores + i * PAGE;
        _tile_stored(0, to, SCORE_BYTES);
        _tile_stored(1, to + 16 * SCORE_STRIDE, SCORE_BYTES);
        _tile_stored(2, to + 16, SCORE_BYTES);
        _tile_stored(3, to + 16 * SCORE_STRIDE + 16, SCORE_BYTES);
    }
}

// out = (first ? 0 : out) + shares × values
void products_few(const float* shares, int size, const bf16* const* values, int pages, bool first, float* out) {
    fence();
    const int bytes = size * int(sizeof(float));
    for (int c = 0; c < size; c += 64) {
        const bool four = c + 32 < size;
        float* to = out + c;
        if (first) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, to, bytes);
            _tile_loadd(1, to + 16, bytes);
            if (four) {
                _tile_loadd(2, to + 32, bytes);
                _tile_loadd(3, to + 48, bytes);
            }
        }
        for (int i = 0; i < pages; ++i) {
            const bf16* b = values[i] + c * 2;
            _tile_loadd(4, reinterpret_cast<const bf16*>(shares) + i * PAGE, SCORE_BYTES);
            _tile_loadd(5, b, bytes);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, b + 32, bytes);
            _tile_dpbf16ps(1, 4, 6);
            if (four) {
                _tile_loadd(7, b + 64, bytes);
                _tile_dpbf16ps(2, 4, 7);
                _tile_loadd(5, b + 96, bytes);
                _tile_dpbf16ps(3, 4, 5);
            }
        }
        _tile_stored(0, to, bytes);
        _tile_stored(1, to + 16, bytes);
        if (four) {
            _tile_stored(2, to + 32, bytes);
            _tile_stored(3, to + 48, bytes);
        }
    }
}

void products_many(const float* shares, int size, const bf16* const* values, int pages, bool first, float* out) {
    fence();
    const int bytes = size * int(sizeof(float));
    const float* lower = shares + 16 * SCORE_STRIDE;
    for (int c = 0; c < size; c += 32) {
        float *to = out + c, *to_lower = to + 16 * size;
        if (first) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, to, bytes);
            _tile_loadd(1, to_lower, bytes);
            _tile_loadd(2, to + 16, bytes);
            _tile_loadd(3, to_lower + 16, bytes);
        }
        for (int i = 0; i < pages; ++i) {
            const bf16* b = values[i] + c * 2;
            _tile_loadd(4, reinterpret_cast<const bf16*>(shares) + i * PAGE, SCORE_BYTES);
            _tile_loadd(6, b, bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, reinterpret_cast<const bf16*>(lower) + i * PAGE, SCORE_BYTES);
            _tile_dpbf16ps(1, 5, 6);
            _tile_loadd(7, b + 32, bytes);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, to, bytes);
        _tile_stored(1, to_lower, bytes);
        _tile_stored(2, to + 16, bytes);
        _tile_stored(3, to_lower + 16, bytes);
    }
}

// Scores s of whole pages become c · tanh(s · scale / c) · log2 e.
void cap(float* scores, int rows, int pages, float scale, float softcap) {
    const __m512 inner = _mm512_set1_ps(2.0f * LOG2_E * scale / softcap), outer = _mm512_set1_ps(softcap * LOG2_E);
    const __m512 one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f);
    for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < pages * PAGE; i += 16) {
            float* s = scores + r * SCORE_STRIDE + i;
            const __m512 e = exp2_16(_mm512_mul_ps(_mm512_loadu_ps(s), inner));  // tanh x = 1 - 2 / (e^2x + 1)
            const __m512 tanh = _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(e, one)));
            _mm512_storeu_ps(s, _mm512_mul_ps(tanh, outer));
        }
    }
}

// Tokens of one page that rows do not see; row r stands for token (first_row + r) / G of the span.
void hide(float* scores, const Item& item, int group, int64_t start, int64_t page_start, int64_t window) {
    int64_t own = start + item.first_row / group - page_start;
    int of_group = item.first_row % group;
    for (int r = 0; r < item.rows; ++r) {
        uint32_t seen = own < 0 ? 0 : own >= PAGE - 1 ? ~0u : (2u << own) - 1;
        const int64_t before = window ? own - window + 1 : 0;  // tokens of the page that are too far back
        if (before > 0) seen = before >= PAGE ? 0 : seen & (~0u << before);
        float* s = scores + r * SCORE_STRIDE;
        _mm512_mask_storeu_ps(s, __mmask16(~seen), _mm512_set1_ps(NEVER));
        _mm512_mask_storeu_ps(s + 16, __mmask16(~seen >> 16), _mm512_set1_ps(NEVER));
        if (++of_group == group) {
            of_group = 0;
            ++own;
        }
    }
}

// Scores become shares 2^((s - highest so far) · factor), in bfloat16; what was summed before is brought to the same
// base.
void shares_of(const Worker& w, int rows, int pages, float factor, bool first, int size) {
    float now[BLOCK_ROWS];
    for (int r = 0; r < rows; ++r) {
        const float* s = w.scores + r * SCORE_STRIDE;
        __m512 a = _mm512_loadu_ps(s), b = _mm512_loadu_ps(s + 16);
        for (int i = PAGE; i < pages * PAGE; i += PAGE) {
            a = _mm512_max_ps(a, _mm512_loadu_ps(s + i));
            b = _mm512_max_ps(b, _mm512_loadu_ps(s + i + 16));
        }
        now[r] = _mm512_reduce_max_ps(_mm512_max_ps(a, b));
    }
    const __m512 scale = _mm512_set1_ps(factor);
    bool rescaled = false;
    for (int r = 0; r < rows; r += 16) {
        const __mmask16 lanes = first_lanes(rows - r);
        const __m512 before = first ? _mm512_set1_ps(NEVER) : _mm512_loadu_ps(w.highest + r);
        const __m512 high = _mm512_max_ps(before, _mm512_maskz_loadu_ps(lanes, now + r));
        // A row that has seen nothing yet has no highest score: any finite number serves.
        const __mmask16 nothing = _mm512_cmp_ps_mask(high, _mm512_set1_ps(NEVER), _CMP_EQ_OQ);
        const __m512 base = _mm512_mask_blend_ps(nothing, high, _mm512_setzero_ps());
        _mm512_storeu_ps(w.highest + r, high);
        _mm512_storeu_ps(w.factors + r, exp2_16(_mm512_mul_ps(_mm512_sub_ps(before, base), scale)));
        _mm512_mask_storeu_ps(now + r, lanes, _mm512_mul_ps(base, scale));
        rescaled |= (_mm512_cmp_ps_mask(before, high, _CMP_NEQ_UQ) & lanes) != 0;
    }
    for (int r = 0; r < rows; ++r) {
        const float* s = w.scores + r * SCORE_STRIDE;
        bf16* p = reinterpret_cast<bf16*>(w.scores + r * SCORE_STRIDE);
        const __m512 base = _mm512_set1_ps(now[r]);
        __m512 sum = _mm512_setzero_ps(), other = sum;
        if (!first) sum = _mm512_mul_ps(_mm512_loadu_ps(w.sums + r * 16), _mm512_set1_ps(w.factors[r]));
        for (int i = 0; i < pages * PAGE; i += PAGE) {
            const __m512 a = exp2_16(_mm512_fmsub_ps(_mm512_loadu_ps(s + i), scale, base));
            const __m512 b = exp2_16(_mm512_fmsub_ps(_mm512_loadu_ps(s + i + 16), scale, base));
            sum = _mm512_add_ps(sum, a);
            other = _mm512_add_ps(other, b);
            _mm512_storeu_si512(p + i, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        }
        _mm512_storeu_ps(w.sums + r * 16, _mm512_add_ps(sum, other));
    }
    if (first || !rescaled) return;
    for (int r = 0; r < rows; ++r) {
        const __m512 by = _mm512_set1_ps(w.factors[r]);
        float* o = w.out + r * size;
        for (int i = 0; i < size; i += 16) _mm512_storeu_ps(o + i, _mm512_mul_ps(_mm512_loadu_ps(o + i), by));
    }
}

// ---- items -------------------------------------------------------------------------------------------------------

bf16* out_row(const Plan& plan, const Call& call, const Span& span, const Item& item, int r) {
    const int row = item.first_row + r;
    const int64_t head = int64_t(item.head) * plan.group + row % plan.group;
    return call.out + (span.first_token + row / plan.group) * call.out_row + head * plan.head_dim;
}

// Rows of an item that is a part: those of one token.
inline int64_t part_rows(const Plan& plan) { return std::min(plan.group, BLOCK_ROWS); }

// Of a part: [rows] highest scores, [rows] sums, [rows, D] results.
inline int64_t part_floats(const Plan& plan) { return part_rows(plan) * (plan.head_dim + 2); }

// By whoever finishes the last part; in the order of the sequence.
void merge(const Plan& plan, const Call& call, const Item& item, float* parts, float factor) {
    const Span& span = plan.spans[item.span];
    const Split& split = plan.splits[item.split];
    const int size = plan.head_dim;
    const int64_t step = part_floats(plan), most = part_rows(plan);
    float* begin = parts + split.first * step;
    for (int r = 0; r < item.rows; ++r) {
        float highest = NEVER, sum = 0.0f;
        for (int i = 0; i < split.parts; ++i) highest = std::max(highest, begin[i * step + r]);
        for (int i = 0; i < split.parts; ++i) {
            float& of_part = begin[i * step + r];  // becomes the weight; a part that is outside the window has none
            of_part = of_part == NEVER ? 0.0f : std::exp2((of_part - highest) * factor);
            if (of_part != 0.0f) sum += of_part * begin[i * step + most + r];
        }
        bf16* to = out_row(plan, call, span, item, r);
        for (int c = 0; c < size; c += 16) {
            __m512 total = _mm512_setzero_ps();
            for (int i = 0; i < split.parts; ++i) {
                const float* part = begin + i * step;
                if (part[r] == 0.0f) continue;
                const __m512 o = _mm512_loadu_ps(part + 2 * most + r * size + c);
                total = _mm512_fmadd_ps(o, _mm512_set1_ps(part[r]), total);
            }
            store16(to + c, _mm512_div_ps(total, _mm512_set1_ps(sum)));
        }
    }
}

// Pages of an item that its rows see any of: [first, stop).
struct Pages {
    int64_t first, stop;
};

Pages seen_pages(const Plan& plan, const Call& call, const Item& item) {
    const int64_t first_own = plan.spans[item.span].start + item.first_row / plan.group;
    const int64_t last_own = plan.spans[item.span].start + (item.first_row + item.rows - 1) / plan.group;
    const int64_t low = call.window ? std::max(int64_t(0), first_own - call.window + 1) : 0;
    return {std::max(int64_t(item.first_page), low / PAGE), std::min(int64_t(item.stop_page), last_own / PAGE + 1)};
}

// Asks for an item's rows of queries: lines far apart, which no prefetcher of the processor foresees. 8 prompts of 128
// tokens: 812 against 893 µs a layer on one core. Asking for pages gained nothing.
void prefetch_queries(const Plan& plan, const Call& call, const Item& item) {
    const int64_t first = plan.spans[item.span].first_token + item.first_row / plan.group;
    const int64_t stop = first + divide_up(item.first_row % plan.group + item.rows, plan.group);
    for (int64_t token = first; token < stop; ++token) {
        for (int g = 0; g < plan.group; ++g) {
            const int64_t head = int64_t(item.head) * plan.group + g;
            const bf16* row = call.query + token * call.query_row + head * call.query_head;
            for (int i = 0; i < plan.head_dim; i += 32) _mm_prefetch((const char*)(row + i), _MM_HINT_T0);
        }
    }
}

void attend(Plan& plan, const Call& call, const Item& item, const Worker& w, RowTiles& tiles, float* parts) {
    const Span& span = plan.spans[item.span];
    const int size = plan.head_dim;
    const bool few = item.rows <= TILE_ROWS;
    const float factor = call.softcap > 0.0f ? 1.0f : call.scale * LOG2_E;
    if (span.writes_itself && item.stop_page > span.start / PAGE) write_token(plan, call, span, item.head, w.queries);
    turned_queries(plan, call, span, item, w.queries);
    tiles.set(item.rows);
    const Pages pages = seen_pages(plan, call, item);
    const int64_t first_own = span.start + item.first_row / plan.group;
    const int64_t last_own = span.start + (item.first_row + item.rows - 1) / plan.group;
    for (int64_t page = pages.first, stop; page < pages.stop; page = stop) {
        stop = std::min(pages.stop, (page / GROUP + 1) * GROUP);
        const bf16 *keys[GROUP], *values[GROUP];
        const int count = int(stop - page);
        const bool first = page == pages.first;
        for (int i = 0; i < count; ++i) {
            const int64_t at = page_at(plan, span, page + i, item.head);
            keys[i] = call.keys + at;
            values[i] = call.values + at;
        }
        (few ? scores_few : scores_many)(w.queries, size, keys, count, w.scores);
        if (call.softcap > 0.0f) cap(w.scores, item.rows, count, call.scale, call.softcap);
        for (int i = 0; i < count; ++i) {
            const int64_t begin = (page + i) * PAGE;
            if (begin + PAGE - 1 > first_own || (call.window && begin <= last_own - call.window)) {
                hide(w.scores + i * PAGE, item, plan.group, span.start, begin, call.window);
            }
        }
        shares_of(w, item.rows, count, factor, first, size);
        (few ? products_few : products_many)(w.scores, size, values, count, first, w.out);
    }
    if (item.split < 0) {
        for (int r = 0; r < item.rows; ++r) {
            bf16* to = out_row(plan, call, span, item, r);
            const __m512 by = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_loadu_ps(w.sums + r * 16)));
            for (int i = 0; i < size; i += 16) {
                store16(to + i, _mm512_mul_ps(_mm512_loadu_ps(w.out + r * size + i), by));
            }
        }
        return;
    }
    const int64_t most = part_rows(plan);
    float* part = parts + (plan.splits[item.split].first + item.part) * part_floats(plan);
    for (int r = 0; r < item.rows; ++r) {
        part[r] = pages.first < pages.stop ? w.highest[r] : NEVER;
        part[most + r] = _mm512_reduce_add_ps(_mm512_loadu_ps(w.sums + r * 16));
    }
    std::memcpy(part + 2 * most, w.out, size_t(item.rows) * size * sizeof(float));
    if (plan.unfinished[item.split].fetch_sub(1, std::memory_order_acq_rel) == 1) {
        merge(plan, call, item, parts, factor);
    }
}

void plan_span(Plan& plan, int32_t index) {
    Span& span = plan.spans[index];
    const int64_t tokens = span.stop - span.start, rows = tokens * plan.group;
    span.writes_itself = tokens == 1 && rows <= BLOCK_ROWS;
    if (!span.writes_itself) {
        for (int64_t page = span.start / PAGE; page * PAGE < span.stop; ++page) {
            plan.writes.push_back({index, int32_t(page)});
        }
    }
    for (int32_t head = 0; head < plan.kv_heads; ++head) {
        for (int64_t row = 0; row < rows; row += BLOCK_ROWS) {
            const int count = int(std::min(rows - row, int64_t(BLOCK_ROWS)));
            const int32_t pages = int32_t((span.start + (row + count - 1) / plan.group) / PAGE + 1);
            const int parts = tokens == 1 ? int(divide_up(pages, PART)) : 1;
            const int32_t split = parts > 1 ? int32_t(plan.splits.size()) : -1;
            if (parts > 1) {
                plan.splits.push_back({plan.parts, parts});
                plan.parts += parts;
            }
            for (int part = 0; part < parts; ++part) {
                const int32_t first = part * PART, stop = parts > 1 ? std::min(pages, first + PART) : pages;
                const int64_t cost = int64_t(stop - first) * (count <= TILE_ROWS ? SMALL_COST : LARGE_COST);
                plan.items.push_back({index, head, int32_t(row), count, first, stop, split, part, cost});
            }
        }
    }
}

}  // namespace
}  // namespace lorafleet

using namespace lorafleet;

// What a step's calls share; null without memory. `spans [count][3]`: start, stop, and pages of the sequence, which lie
// one sequence after the other in `tables`. The step's tokens stand in the order of the spans.
extern "C" __attribute__((visibility("default"))) void* lorafleet_attention_plan(
    const int64_t* spans, int64_t count, const int32_t* tables, int head_dim, int heads, int kv_heads) {
    try {
        Plan plan{head_dim, heads, kv_heads, heads / kv_heads, {}, {}, {}, {}, {}, 0, {}};
        int64_t table = 0, token = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t* span = spans + i * 3;
            plan.spans.push_back({span[0], span[1], table, token, false});
            table += span[2];
            token += span[1] - span[0];
        }
        plan.tables.assign(tables, tables + table);
        for (int64_t i = 0; i < count; ++i) plan_span(plan, int32_t(i));
        std::stable_sort(
            plan.items.begin(), plan.items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
        plan.unfinished = std::vector<std::atomic<int32_t>>(plan.splits.size());
        return new Plan(std::move(plan));
    } catch (...) {
        return nullptr;
    }
}

extern "C" __attribute__((visibility("default"))) void lorafleet_attention_free(void* plan) {
    delete static_cast<Plan*>(plan);
}

// One layer: keys and values of the step's tokens into their pages, then attention. 0, or 1 without memory.
extern "C" __attribute__((visibility("default"))) int lorafleet_attention(void* step, const void* layer) {
    static thread_local Scratch memory;
    Plan& plan = *static_cast<Plan*>(step);
    const Call& call = *static_cast<const Call*>(layer);
    const size_t each = Worker::bytes(plan.head_dim);
    const size_t parts_bytes = size_t(plan.parts) * size_t(part_floats(plan)) * sizeof(float);
    char* room;
    try {
        room = static_cast<char*>(memory.bytes(each * call.threads + parts_bytes));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    float* parts = reinterpret_cast<float*>(room + each * call.threads);
    for (size_t i = 0; i < plan.splits.size(); ++i) plan.unfinished[i] = plan.splits[i].parts;
    const int64_t writes = int64_t(plan.writes.size()) * plan.kv_heads, items = int64_t(plan.items.size());
    std::atomic<int64_t> claimed{0};  // beside the first of each thread
#pragma omp parallel num_threads(call.threads)
    {
        const int me = omp_get_thread_num(), team = omp_get_num_threads();
        const Worker w(room + each * me, plan.head_dim);
        RowTiles tiles;
        if (writes) {
            for (int64_t i = writes * me / team; i < writes * (me + 1) / team; ++i) {
                fill_page(plan, call, plan.writes[i / plan.kv_heads], int(i % plan.kv_heads), w.queries);
            }
#pragma omp barrier
        }
        for (int64_t mine = me, next; mine < items; mine = next) {
            next = team + claimed.fetch_add(1, std::memory_order_relaxed);
            if (next < items) prefetch_queries(plan, call, plan.items[next]);
            attend(plan, call, plan.items[mine], w, tiles, parts);
        }
    }
    return 0;
}

// Of the structure that the Python side mirrors.
extern "C" __attribute__((visibility("default"))) int64_t lorafleet_attention_call_bytes() { return sizeof(Call); }
