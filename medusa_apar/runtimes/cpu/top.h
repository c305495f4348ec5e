// The largest of many logits, and the logarithm that turns them into probabilities.
#pragma once

#include <vector>

#include "matrix.h"

namespace mapar {

inline bool any_above(vf v, float limit) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(limit), _CMP_GT_OQ)) != 0;
#elif defined(__aarch64__)
    return vmaxvq_u32(vcgtq_f32((float32x4_t)v, vdupq_n_f32(limit))) != 0;
#else
    const vi above = v > splat(limit);
    int32_t part[LANES], all = 0;
    std::memcpy(part, &above, sizeof above);
    for (int i = 0; i < LANES; i++) all |= part[i];
    return all != 0;
#endif
}

constexpr int MOST_INSERTED = 128;

inline void insert(float value, int64_t index, int count, int64_t* indices, float* values) {
    int place = count - 1;
    for (; place > 0 && values[place - 1] < value; place--) {
        values[place] = values[place - 1];
        indices[place] = indices[place - 1];
    }
    values[place] = value;
    indices[place] = index;
}

// By sorting, where so many are asked for that each one's place among them would be long to find.
inline void sorted_top(const float* x, int width, int count, int64_t* indices, float* values) {
    std::vector<int32_t> order;
    for (int i = 0; i < width; i++)
        if (x[i] > -INFINITY) order.push_back(i);
    const int found = std::min<int>(count, order.size());
    std::partial_sort(order.begin(), order.begin() + found, order.end(),
                      [&](int32_t a, int32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; });
    for (int i = 0; i < found; i++) indices[i] = order[i], values[i] = x[order[i]];
}

// The largest, the first of equals first; behind what is above -inf come index 0 and -inf. NaN is above nothing.
inline void top(const float* x, int width, int count, int64_t* indices, float* values) {
    std::fill(values, values + count, -INFINITY);
    std::fill(indices, indices + count, 0);
    if (count > MOST_INSERTED) return sorted_top(x, width, count, indices, values);
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

// Sums over scores that are not NaN, most being the greatest: of e^x, x = score - most, and of x e^x where it is asked.
struct Mass {
    double total = 0, spread = 0;
};
template <bool SPREAD>
inline Mass masses(const float* s, int size, float most) {
    Mass all;
    int i = 0;
    for (; i + LANES <= size;) {  // in parts, so that floats are exact enough
        vf part = {}, spread = {};
        for (const int end = std::min(size / LANES * LANES, i + 64 * LANES); i < end; i += LANES) {
            const vf v = load(s + i), x = v - most, e = v > splat(-INFINITY) ? exp(x) : vf{};
            part += e;
            if constexpr (SPREAD) spread += v > splat(-INFINITY) ? x * e : vf{};
        }
        all.total += sum(part);
        if constexpr (SPREAD) all.spread += sum(spread);
    }
    for (; i < size; i++)
        if (s[i] > -INFINITY) {
            const float x = s[i] - most, e = std::exp(x);
            all.total += e, all.spread += (double)x * e;
        }
    return all;
}
inline double mass(const float* s, int size, float most) { return masses<false>(s, size, most).total; }

// The logarithm of the sum of all exponentials of scores that are not NaN, most being the greatest.
inline double log_sum(const float* s, int size, float most) {
    return most > -INFINITY && most < INFINITY ? most + std::log(mass(s, size, most)) : most;
}

}  // namespace mapar
