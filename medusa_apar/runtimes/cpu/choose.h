// Choosing tokens: the likeliest by score, or by score and the noise of `reference.noisy`. A row depends on nothing but its
// own logits, path and key.
//
// Noise is a float64 logarithm of a logarithm; a cheap bound on it tells which tokens could win at all.
#pragma once

#include "noise.h"
#include "scores.h"

namespace mapar {

// The best of the tokens seen so far by score with noise, of equals the lowest.
struct Best {
    float total = -INFINITY;
    int64_t token = -1;
    void see(float score, uint32_t word, int64_t id) {
        const float with_noise = (float)((double)score + gumbel(word));
        if (with_noise > total || (with_noise == total && id < token)) total = with_noise, token = id;
    }
};

// The likeliest token, -1 where nothing is possible.
inline int64_t likeliest(const Scores& all) {
    const float* s = all.scores();
    const float most = peak(s, all.size());
    if (!(most > -INFINITY)) return -1;
    for (int i = 0;; i++)
        if (s[i] == most) return all.id(i);
}

// The token that `reference.sample` draws, -1 where nothing is possible.
inline int64_t sampled(const Scores& all, uint64_t seed, uint64_t thread, uint64_t position) {
    const float* s = all.scores();
    const int size = all.size();
    if (!(peak(s, size) > -INFINITY)) return -1;
    Best best;
    uint32_t words[4 * BLOCKS];
    if (all.listed() || size < 4 * BLOCKS) {
        for (int i = 0; i < size; i++) {
            // Infinite ones are compared as they are, whatever the noise.
            if (!(s[i] > -INFINITY) || s[i] + MOST_NOISE < best.total) continue;
            philox(seed, thread, position, (uint32_t)(all.id(i) / 4), words);
            best.see(s[i], words[all.id(i) % 4], all.id(i));
        }
        return best.token;
    }
    // The likeliest without noise first: most others cannot reach it.
    const int64_t first = likeliest(all);
    philox(seed, thread, position, (uint32_t)(first / 4), words);
    best.see(s[first], words[first % 4], first);
    int i = 0;
    for (; i + 4 * BLOCKS <= size; i += 4 * BLOCKS) {
        bool near = false;
        const float below = std::nextafter(best.total, -INFINITY);
        for (int k = 0; k < 4 * BLOCKS; k += LANES) near |= any_above(load(s + i + k) + MOST_NOISE, below);
        if (!near) continue;
        words32(seed, thread, position, (uint32_t)(i / 4), words);
        for (int k = 0; k < 4 * BLOCKS; k += LANES) {
            const vf bound = load(s + i + k) + most_noise(words + k);
            if (!any_above(bound, std::nextafter(best.total, -INFINITY))) continue;
            for (int j = k; j < k + LANES; j++)
                if (s[i + j] > -INFINITY && bound[j - k] >= best.total) best.see(s[i + j], words[j], i + j);
        }
    }
    for (; i < size; i++)
        if (s[i] > -INFINITY) {
            philox(seed, thread, position, (uint32_t)(i / 4), words);
            best.see(s[i], words[i % 4], i);
        }
    return best.token;
}

// What `reference.likeliest_path` goes by: the entropy of a row's distribution, and what it gives the tokens drafted behind
// it. A score of infinity makes all of it NaN, and nothing is accepted.
inline void judge(const Choices& all, int i, const Scores& scores) {
    const auto behind = [&](auto use) {  // a segment's rows are side by side, parents before children
        for (int j = i + 1; j < all.count && all.rows[j].recipe == all.rows[i].recipe; j++)
            if (all.rows[j].parent == i) use(j);
    };
    bool any = false;
    behind([&](int) { any = true; });
    if (!any) return;
    const float* s = scores.scores();
    const float most = peak(s, scores.size());
    const Mass mass = masses<true>(s, scores.size(), most);
    const double log_total = std::log(mass.total);
    all.entropies[i] = most < INFINITY ? log_total - mass.spread / mass.total : NAN;
    behind([&](int j) {
        const int place = scores.place(all.rows[j].token);
        const bool possible = place >= 0 && s[place] > -INFINITY;
        all.log_probs[j] = !(most < INFINITY) ? NAN : possible ? (double)s[place] - most - log_total : -INFINITY;
    });
}

// In a parallel region: rows go to whichever thread is free, since some take ten times as long as others.
inline void choose(const Choices& all) {
    static thread_local std::vector<float> dense;
    dense.resize(std::max(dense.size(), (size_t)all.vocabulary));
    Scores scores(all, dense);
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < all.count; i++) {
        const Choice& row = all.rows[i];
        const Recipe& recipe = all.recipes[row.recipe];
        scores.make(row);
        if (recipe.judged) judge(all, i, scores);
        all.tokens[i] = recipe.sampled ? sampled(scores, recipe.seed, row.key, row.position) : likeliest(scores);
    }
}

}  // namespace mapar
