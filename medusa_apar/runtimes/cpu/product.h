// Products of whole matrices, shared by the threads of a region.
#pragma once

#include "matrix.h"
#include "team.h"

namespace mapar {

// Where rows are rounded to for the matrix that reads them next. int8: steps [rows][inputs], groups [rows][inputs / 64];
// bfloat16: Half [rows][inputs] in the place of `steps`, which has four bytes for each.
struct Quantised {
    int8_t* steps;
    Group* groups;
};

// The matrix's view of rows that lie in `floats`; but for float32 `prepare` rounds them first.
inline Rows rows_for(const Matrix& m, const float* floats, int stride, const Quantised& q) {
    return {floats, stride, {q.steps, q.groups, m.inputs}, {(const Half*)q.steps, m.inputs}};
}

inline void prepare(const Matrix& m, const float* x, int width, int row, const Quantised& q) {
    if (m.kind == FLOAT32) return;
    const size_t first = (size_t)row * m.inputs;
    if (m.kind == BFLOAT16) return quantise_bf16(x, width, m.inputs, (Half*)q.steps + first);
    quantise_int8(x, width, m.inputs, q.steps + first, q.groups + first / GROUP_INPUTS);
}

// LANES elements of an embedding table in float32 or bfloat16.
inline vf embedded(const void* table, int kind, size_t place) {
    if (kind == FLOAT32) return load((const float*)table + place);
    typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
    typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
    vh half;
    std::memcpy(&half, (const uint16_t*)table + place, sizeof half);
    const vu bits = __builtin_convertvector(half, vu) << 16;
    vf v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
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
    in_pairs(panels.first, panels.last, [&](int index, auto count) {
        tiles<count>(m, index, x, rows, [&](int first, int size, auto& tile) {
            for (int p = 0; p < count; p++) {
                const int column = (index + p) * PANEL, used = std::min(PANEL, outputs - column);
                for (int r = 0; r < size; r++)
                    std::memcpy(y + (size_t)(first + r) * stride + column, tile[p][r], sizeof(float) * used);
            }
        });
    });
    release_tiles();
}

}  // namespace mapar
