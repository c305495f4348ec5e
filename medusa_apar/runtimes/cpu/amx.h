// Products of int8 in tiles of 16 by 16 sums (AMX): what `int8.h` says, for many rows at once.
#pragma once

#include "int8.h"
#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__linux__)
#define MAPAR_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mapar {

#ifdef MAPAR_AMX
constexpr int AMX_ROWS = 32, AMX_LEAST = 8;  // two tiles of rows; fewer than 8 vpdpbusd takes as fast

// Whether this process may use tiles: Linux has to be asked.
inline bool amx_allowed() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return allowed;
}

// Tiles 0 to 3: sums of (rows, panel); 4, 5: rows; 6, 7: weights.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    TileConfig(int low, int high) {
        for (int t = 0; t < 8; t++) {
            bytes[t] = 64;
            rows[t] = t >= 6 ? 16 : (t == 0 || t == 1 || t == 4) ? low : high;
        }
    }
};

// What this thread's tiles are set to; released at the end of a step, since every switch of threads would save them.
inline thread_local int tiles_set = 0;

inline void set_tiles(int rows) {
    // What the intrinsics of loading read is not known to all compilers (GCC bug 114098): it is to be in memory by now.
    asm volatile("" ::: "memory");
    if (tiles_set == rows) return;
    const int low = std::min(rows, 16), high = rows > 16 ? rows - 16 : 1;
    const TileConfig config(low, high);
    asm volatile("ldtilecfg %0" : : "m"(config));
    tiles_set = rows;
}
inline void release_tiles() {
    if (tiles_set) _tile_release();
    tiles_set = 0;
}

// As `panels_int8`, of at most AMX_ROWS rows.
template <int P>
__attribute__((noinline)) void panels_amx(const int8_t* panels, const float* scales, int inputs, const Int8Rows& x, int first,
                                          int rows, float* out, int panel_stride) {
    static_assert(P <= 2);
    set_tiles(rows);
    alignas(64) int32_t sums[P][AMX_ROWS][PANEL];
    const int count = inputs / GROUP_INPUTS, group_stride = x.stride / GROUP_INPUTS;
    const int8_t* steps = x.steps + (size_t)first * x.stride;
    const Group* groups = x.groups + (size_t)first * group_stride;
    const int8_t* second = panels + (size_t)PANEL * inputs;
    const bool both = rows > 16;
    for (int g = 0; g < count; g++) {
        const int8_t* row = steps + g * GROUP_INPUTS;
        _tile_zero(0);
        _tile_loadd(4, row, x.stride);
        _tile_loadd(6, panels + (size_t)g * GROUP_BYTES, 4 * PANEL);
        _tile_dpbssd(0, 4, 6);
        if (P == 2) {
            _tile_zero(1);
            _tile_loadd(7, second + (size_t)g * GROUP_BYTES, 4 * PANEL);
            _tile_dpbssd(1, 4, 7);
        }
        if (both) {
            _tile_zero(2);
            _tile_loadd(5, row + (size_t)16 * x.stride, x.stride);
            _tile_dpbssd(2, 5, 6);
            if (P == 2) {
                _tile_zero(3);
                _tile_dpbssd(3, 5, 7);
            }
        }
        _tile_stored(0, sums[0][0], 4 * PANEL);
        if (P == 2) _tile_stored(1, sums[P - 1][0], 4 * PANEL);
        if (both) {
            _tile_stored(2, sums[0][16], 4 * PANEL);
            if (P == 2) _tile_stored(3, sums[P - 1][16], 4 * PANEL);
        }
        for (int p = 0; p < P; p++) {
            cf weight_scales;
            std::memcpy(&weight_scales, scales + ((size_t)p * count + g) * PANEL, sizeof weight_scales);
            for (int r = 0; r < rows; r++) {
                ci whole;
                std::memcpy(&whole, sums[p][r], sizeof whole);
                add_scaled(out + (size_t)p * panel_stride + r * PANEL, whole, weight_scales,
                           groups[(size_t)r * group_stride + g].scale);
            }
        }
    }
}
#else
inline void release_tiles() {}
#endif

}  // namespace mapar
