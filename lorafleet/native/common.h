// What every kernel of this folder uses: bfloat16, tiles of the matrix unit (AMX), and memory.
//
// A tile register holds up to 16 rows of 64 bytes. A product C += A B takes A as 16 rows of 32 bfloat16, B as 16 rows
// of 16 pairs: row p of B holds elements 2p and 2p + 1 of the inner dimension for 16 columns, pair by pair.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace lorafleet {

using bf16 = uint16_t;

constexpr int TILE_ROWS = 16;
constexpr int TILE_K = 32;        // elements of the inner dimension in a tile
constexpr int TILE_ELEMENTS = 512;
constexpr int BLOCK_ROWS = 32;    // tokens that are computed together: two tiles
constexpr int PAGE_TOKENS = 32;   // of keys and values
constexpr int MOST_MODULES = 8;   // of a group of linears

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- bfloat16 ----------------------------------------------------------------------------------------------------

// Lanes that are not read are zeros.
inline __m512 load16(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

inline __m512 load16(const bf16* p, __mmask16 lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
}

inline void store16(bf16* p, __m512 v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }

inline void store16(bf16* p, __m512 v, __mmask16 lanes) {
    _mm256_mask_storeu_epi16(p, lanes, (__m256i)_mm512_cvtneps_pbh(v));
}

inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }

constexpr float LOG2_E = 1.44269504f;

// 2^x to 3e-6 of it, exact at whole numbers; what comes of it is rounded to bfloat16, to 2e-3. x = n + f with
// 0 <= f < 1, and a polynomial that was fitted to 2^f. For -inf 0.
inline __m512 exp2_16(__m512 x) {
    const __m512 f = _mm512_reduce_ps(x, 0x09);  // less its floor; without exceptions
    __m512 p = _mm512_set1_ps(0.0134266855f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0522424722f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.241280206f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693044845f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, x);
}

// 1 / x to 1e-7 of itself, for x of at least 1: an estimate of 14 bits and a step of Newton's.
inline __m512 reciprocal16(__m512 x) {
    const __m512 y = _mm512_rcp14_ps(x);
    return _mm512_mul_ps(y, _mm512_fnmadd_ps(x, y, _mm512_set1_ps(2.0f)));
}

// ---- tiles -------------------------------------------------------------------------------------------------------

// Registers: 0 to 3 hold results, 4 and 5 the two row tiles of A, 6 and 7 two tiles of B.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};
};

// All that was stored so far is in memory before a tile is loaded: to the compiler its load reads nothing.
inline void fence() { asm volatile("" ::: "memory"); }

// As assembly: compilers drop the stores before the intrinsic, which they take to read eight bytes.
inline void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }

// Sets the calling thread's tiles up for blocks of some rows, and remembers for how many.
class Tiles {
  public:
    ~Tiles() {
        if (rows_) _tile_release();
    }

    // For the products of `rows` tokens (1 to 32) with 16 columns of B at a time. What the registers held is lost.
    void set(int rows) {
        if (rows == rows_) return;
        rows_ = rows;
        TileConfig config;
        const int upper = rows < TILE_ROWS ? rows : TILE_ROWS, lower = rows - upper;
        const int height[8] = {upper, lower, upper, lower, upper, lower, 16, 16};
        for (int i = 0; i < 8; ++i) {
            config.rows[i] = uint8_t(height[i]);
            config.column_bytes[i] = height[i] ? 64 : 0;
        }
        configure(config);
    }

  private:
    int rows_ = 0;
};

// ---- memory ------------------------------------------------------------------------------------------------------

// A buffer that grows and is never given back; contents are lost when it grows.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }
    void* bytes(size_t wanted) {
        if (wanted > size_) {
            std::free(data_);
            size_ = (wanted + wanted / 4 + 4095) & ~size_t(4095);
            data_ = std::aligned_alloc(64, size_);
            if (!data_) {
                size_ = 0;
                throw std::bad_alloc();
            }
        }
        return data_;
    }

  private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace lorafleet
