// Weights into panels of int8 steps: what `weights.py` says in torch, bit by bit, at the speed of memory.
#pragma once

#include "matrix.h"
#include "team.h"

#include <cmath>
#include <cstring>

namespace mapar {

inline float number(float x) { return x; }
inline float number(uint16_t bfloat16) {
    const uint32_t bits = (uint32_t)bfloat16 << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// One output's weights; `panel` and `scales` begin at its place in its panel. Weights that are not finite leave a scale
// that is not.
template <class T>
inline void pack_int8(const T* weights, int inputs, int groups, int8_t* panel, float* scales) {
    for (int g = 0; g < groups; g++, panel += GROUP_INPUTS * PANEL, scales += PANEL) {
        alignas(64) float x[GROUP_INPUTS] = {};
        const int count = std::min(GROUP_INPUTS, inputs - g * GROUP_INPUTS);
        for (int i = 0; i < count; i++) x[i] = number(weights[g * GROUP_INPUTS + i]);
        hadamard<GROUP_INPUTS>(x);
        int32_t most = 0;  // the largest amount's bits: NaN is larger than all numbers
        for (int i = 0; i < GROUP_INPUTS; i++) {
            x[i] *= 1 / ROTATED;
            int32_t bits;
            std::memcpy(&bits, x + i, sizeof bits);
            most = std::max(most, bits & 0x7FFFFFFF);
        }
        float peak;
        std::memcpy(&peak, &most, sizeof peak);
        const float scale = *scales = peak / 127;
        const bool finite = scale > 0 && most < 0x7F800000;
        int8_t steps[GROUP_INPUTS] = {};
        if (finite)
            for (int i = 0; i < GROUP_INPUTS; i++) steps[i] = (int8_t)(int32_t)std::nearbyint(x[i] / scale);
        for (int i = 0; i < GROUP_INPUTS; i += 4) std::memcpy(panel + i * PANEL, steps + i, 4);
    }
}

template <class T>
inline void pack_int8_panels(const T* weights, int outputs, int inputs, int8_t* panels, float* scales) {
    const int groups = (inputs + GROUP_INPUTS - 1) / GROUP_INPUTS;
    const size_t steps = (size_t)groups * GROUP_INPUTS * PANEL;
    const Share mine = share((outputs + PANEL - 1) / PANEL);
    for (int p = mine.first; p < mine.last; p++)
        for (int lane = 0; lane < PANEL; lane++) {
            const int output = p * PANEL + lane, count = output < outputs ? inputs : 0;  // beyond: zeros
            const T* row = weights + (size_t)(count ? output : 0) * inputs;
            pack_int8(row, count, groups, panels + p * steps + lane * 4, scales + p * (steps / GROUP_INPUTS) + lane);
        }
}

}  // namespace mapar
