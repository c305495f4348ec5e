// Products of whole matrices, shared by the threads of a region.
#pragma once

#include "matrix.h"
#include "team.h"

namespace mapar {

// The matrix's view of rows that lie in `floats`; int8 ones are quantised into `act` first, by `prepare`.
inline Rows rows_for(const Matrix& m, const float* floats, int stride, const float* act, const float* scales) {
    if (m.kind == INT8) return {nullptr, (const int16_t*)act, scales, m.inputs};
    return {floats, nullptr, nullptr, stride};
}

inline void prepare(const Matrix& m, const float* x, int width, int row, float* act, float* scales) {
    if (m.kind == INT8)
        scales[row] = quantise(x, width, m.inputs, (int16_t*)act + (size_t)row * m.inputs);
}

// LANES elements of an embedding table in float32 or bfloat16.
inline vf embedded(const void* table, int kind, size_t place) {
    return kind == BFLOAT16 ? widen((const uint16_t*)table + place) : load((const float*)table + place);
}

// What makes a row's mean square 1.
inline vf unit_scale(const float* x, int width, float eps) {
    vf squares = {};
    for (int i = 0; i < width; i += LANES) squares += load(x + i) * load(x + i);
    return splat(1.f / std::sqrt(sum(squares) / width + eps));
}
inline void unit_norm(const float* x, int width, float eps, float* out) {
    const vf scale = unit_scale(x, width, eps);
    for (int i = 0; i < width; i += LANES) store(out + i, load(x + i) * scale);
}
inline void rms_norm(const float* x, const float* weight, int width, float eps, float* out) {
    const vf scale = unit_scale(x, width, eps);
    for (int i = 0; i < width; i += LANES) store(out + i, load(weight + i) * (load(x + i) * scale));
}

// y [rows][outputs] of rows that `prepare` has seen to; call in a parallel region.
inline void multiply(const Matrix& m, const Rows& x, int rows, float* y, int stride, int outputs) {
    const Share panels = share(m.outputs / PANEL);
    for (int p = panels.first; p < panels.last; p++)
        tiles<1>(m, p, x, rows, [&](int first, int count, auto& tile) {
            const int used = std::min(PANEL, outputs - p * PANEL);
            for (int r = 0; r < count; r++)
                std::memcpy(y + (size_t)(first + r) * stride + p * PANEL, tile[0][r], sizeof(float) * used);
        });
}

}  // namespace mapar
