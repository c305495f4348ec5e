// The largest of many logits, and the logarithm that turns them into probabilities.
#pragma once

#include "matrix.h"

namespace mapar {

inline bool any_above(vf v, float limit) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(limit), _CMP_GT_OQ)) != 0;
#else
    const vi above = v > splat(limit);
    int32_t part[LANES], all = 0;
    std::memcpy(part, &above, sizeof above);
    for (int i = 0; i < LANES; i++) all |= part[i];
    return all != 0;
#endif
}

inline void insert(float value, int64_t index, int count, int64_t* indices, float* values) {
    int place = count - 1;
    for (; place > 0 && values[place - 1] < value; place--) {
        values[place] = values[place - 1];
        indices[place] = indices[place - 1];
    }
    values[place] = value;
    indices[place] = index;
}

inline void top(const float* x, int width, int count, int64_t* indices, float* values) {
    std::fill(values, values + count, -INFINITY);
    std::fill(indices, indices + count, 0);
    int i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES) {  // most stretches hold nothing new: one comparison tells
        // Each vector by itself: the larger of a number and a NaN may be the NaN, which is above nothing.
        bool above = false;
        for (int k = 0; k < 4; k++) above |= any_above(load(x + i + k * LANES), values[count - 1]);
        if (!above) continue;
        for (int k = i; k < i + 4 * LANES; k++)
            if (x[k] > values[count - 1]) insert(x[k], k, count, indices, values);
    }
    for (; i < width; i++)
        if (x[i] > values[count - 1]) insert(x[i], i, count, indices, values);
}

inline float sum_of_exponentials(const float* x, int width, float largest) {
    vf sums = {};
    int i = 0;
    for (; i + LANES <= width; i += LANES) sums += exp(load(x + i) - largest);
    float total = sum(sums);
    for (; i < width; i++) total += std::exp(x[i] - largest);
    return total;
}

// The greatest of scores; NaN is none.
inline float peak(const float* s, int size) {
    int i = 0;
    vf peaks = splat(-INFINITY);
    for (; i + LANES <= size; i += LANES) {
        const vf v = load(s + i);
        peaks = v > peaks ? v : peaks;
    }
    float most = largest(peaks);
    for (; i < size; i++)
        if (s[i] > most) most = s[i];
    return most;
}

// The sum of e^(score - most) over scores that are not NaN.
inline double mass(const float* s, int size, float most) {
    double total = 0;
    int i = 0;
    for (; i + LANES <= size;) {  // in parts, so that floats are exact enough
        vf part = {};
        for (const int end = std::min(size / LANES * LANES, i + 64 * LANES); i < end; i += LANES) {
            const vf v = load(s + i), e = exp(v - most);
            part += v > splat(-INFINITY) ? e : vf{};
        }
        total += sum(part);
    }
    for (; i < size; i++)
        if (s[i] > -INFINITY) total += std::exp(s[i] - most);
    return total;
}

}  // namespace mapar
