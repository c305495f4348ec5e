// Sums over the bits of tensors, by which a changed value is found: at memory speed, and the same on any machine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "team.h"

namespace mapar {

// A stretch is TURNS lines of 64 bytes, and each of its lines belongs to one turn. Which one belongs to which moves on
// by one from stretch to stretch: so each turn reads some of every row of a KB and, over the rows, of every column.
constexpr int LINE = 64, TURNS = 16;

typedef uint64_t vw __attribute__((vector_size(LINE)));

struct Span {
    const char* data;
    int64_t bytes;
};

// Each step can be undone, so a word that changes always changes the result. The word's place is mixed in too, so the
// sum over rows changes when two rows are swapped.
inline vw mixed(const char* line, int64_t number, size_t bytes) {
    vw x = {};
    std::memcpy(&x, line, bytes);
    x += (vw{0, 1, 2, 3, 4, 5, 6, 7} + (uint64_t)number * 8) * 0x9E3779B97F4A7C15u;
    x ^= x >> 32;
    x *= 0x2545F4914F6CDD1Du;
    return x ^ (x >> 29);
}

// Adds to sums[TURNS] what this thread's part of a tensor comes to, of one turn or, with -1, of all.
inline void add_sums(const Span& span, int turn, uint64_t* sums) {
    constexpr int64_t STRETCH = TURNS * LINE;
    const int64_t whole = span.bytes / STRETCH;
    const int threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t first = whole * me / threads, last = whole * (me + 1) / threads;
    vw found[TURNS] = {};
    auto add = [&](int64_t stretch, int t, int64_t bytes) {
        const int64_t line = stretch * TURNS + ((t + stretch) & (TURNS - 1));
        found[t] += mixed(span.data + line * LINE, line, bytes);
    };
    if (turn >= 0)
        for (int64_t s = first; s < last; s++) {
            const int64_t ahead = std::min(s + 32, last - 1);  // too far apart for the machine to see it coming
            __builtin_prefetch(span.data + (ahead * TURNS + ((turn + ahead) & (TURNS - 1))) * LINE);
            add(s, turn, LINE);
        }
    else
        for (int64_t s = first; s < last; s++)
#pragma GCC unroll 16
            for (int i = 0; i < TURNS; i++) add(s, (i - s) & (TURNS - 1), LINE);
    if (me == threads - 1)
        for (int64_t line = whole * TURNS; line * LINE < span.bytes; line++)
            if (const int t = (line - whole) & (TURNS - 1); turn < 0 || t == turn)
                add(whole, t, std::min<int64_t>(LINE, span.bytes - line * LINE));
    for (int t = 0; t < TURNS; t++) {
        uint64_t sum = 0;
        for (int i = 0; i < LINE / 8; i++) sum += found[t][i];
        if (!sum) continue;
#pragma omp atomic
        sums[t] += sum;
    }
}

}  // namespace mapar
