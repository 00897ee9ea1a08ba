// Log-probabilities of given tokens under rows of logits: each row is read once, and nothing but a number of it is kept.

#include <omp.h>

#include <cmath>
#include <limits>

#include "common.h"

namespace lorafleet {
namespace {

constexpr int64_t CHUNK = 1024;  // logits of a row between two looks at its highest: 4 kB, which stay in L1

// x[token] - ln Σ exp x, over n logits, in nats. The sum is taken in base 2 with the normaliser that is known so far
// (arXiv 1805.02867, algorithm 3). Not finite where a logit is NaN or +inf.
float logprob(const float* x, int64_t n, int64_t token) {
    const __m512 never = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), log2_e = _mm512_set1_ps(LOG2_E);
    float highest = -std::numeric_limits<float>::infinity();
    double sum = 0;  // of the chunks: in float32, 150 000 terms that are alike would be rounded the same way, to 9e-5
    __mmask16 nan = 0;
    for (int64_t first = 0; first < n; first += CHUNK) {
        const int64_t stop = n - first < CHUNK ? n : first + CHUNK;
        __m512 high = never;
        for (int64_t i = first; i < stop; i += 16) {
            const __m512 v = _mm512_mask_loadu_ps(never, first_lanes(stop - i), x + i);
            nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
            high = _mm512_max_ps(high, v);
        }
        const float of_chunk = _mm512_reduce_max_ps(high);
        if (of_chunk > highest) {
            sum *= std::exp2((highest - of_chunk) * LOG2_E);  // by 0 for the first
            highest = of_chunk;
        }
        if (highest == -std::numeric_limits<float>::infinity()) continue;
        const __m512 base = _mm512_set1_ps(highest);
        __m512 sums = _mm512_setzero_ps();
        for (int64_t i = first; i < stop; i += 16) {
            const __m512 v = _mm512_mask_loadu_ps(never, first_lanes(stop - i), x + i);
            sums = _mm512_add_ps(sums, exp2_16(_mm512_mul_ps(_mm512_sub_ps(v, base), log2_e)));
        }
        sum += _mm512_reduce_add_ps(sums);
    }
    if (nan || !std::isfinite(highest)) return std::numeric_limits<float>::quiet_NaN();
    return (x[token] - highest) - static_cast<float>(std::log(sum));
}

}  // namespace
}  // namespace lorafleet

// Row r of `rows` begins at logits + r · stride and has `columns`; tokens[r] is one of them.
extern "C" __attribute__((visibility("default"))) void lorafleet_logprobs(
    const float* logits, int64_t stride, int64_t rows, int64_t columns, const int64_t* tokens, float* out,
    int threads) {
    // A team costs more than a few rows do.
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 4)
    for (int64_t r = 0; r < rows; ++r) out[r] = lorafleet::logprob(logits + r * stride, columns, tokens[r]);
}
