// Choosing tokens: what transformers' processors make of a row's logits, one operation after the other, and the noise of
// `reference.noisy`. A row depends on nothing but its own logits, path and key.
//
// Operations that drop tokens leave a list of those that are left, so that what follows looks at few. Noise is a float64
// logarithm of a logarithm; a cheap bound on it tells which tokens could win at all. NaN is no token's score here, while
// transformers' own filters may leave nothing, or too much, where one is.
#pragma once

#include <numeric>
#include <vector>

#include "top.h"

namespace mapar {

enum OperationKind : int32_t {
    REPETITION = 0,  // value: scores of tokens on the path, but for `length` first ones, are divided by it, or multiplied
                     // where they are negative
    BIAS,            // ids, values: are added
    MIN_LENGTH,      // count ids are impossible while the path is shorter than `length`
    SUPPRESS,        // count ids are impossible
    BANS,            // ids [Fork], [Child]: the second is impossible, the first where the row says so
    TEMPERATURE,     // value: scores are divided by it
    TOP_K,           // length: tokens that are left, and equals of the last
    TOP_P,           // value: the likeliest with this share in all are left, at least `length`
    MIN_P,           // value: tokens less likely than this share of the likeliest go
    TYPICAL,         // value: the most typical with this share in all are left, at least `length`
};

struct Operation {
    int32_t kind, count, length;
    float value;
    const int64_t* ids;
    const float* values;
};

// What one request makes of logits.
struct Recipe {
    int32_t count, sampled;
    uint64_t seed;
    const Operation* operations;
};

// A row that chooses: int64, one after the other, as Python writes them.
struct Choice {
    int64_t place;        // of the row among the logits
    int64_t recipe;
    int64_t parent;       // the choice behind whose token it stands, -1: it stands behind its path
    int64_t token;        // a draft token: the path's last; not read where there is no parent
    int64_t path, length;   // its first token, and how many
    int64_t key, position;  // of the noise
    int64_t fork_banned;
};

struct Choices {
    int32_t count, vocabulary;
    const Choice* rows;
    const Recipe* recipes;
    const int64_t* paths;
    const float* logits;  // [rows][vocabulary]
    int64_t* tokens;      // [count], -1 where nothing is possible
};

// Four words of Philox4x32-10: token 4 * block and the three behind it.
inline void philox(uint64_t seed, uint64_t thread, uint64_t position, uint32_t block, uint32_t* out) {
    uint32_t c0 = block, c1 = (uint32_t)position, c2 = (uint32_t)thread, c3 = (uint32_t)(thread >> 32);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1, c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

inline double gumbel(uint32_t word) { return -std::log(-std::log((word + 0.5) * 0x1p-32)); }

constexpr float MOST_NOISE = 22.9f;  // -log(2^-33)

// The best of the tokens seen so far by score with noise, of equals the lowest.
struct Best {
    float total = -INFINITY;
    int64_t token = -1;
    void see(float score, uint32_t word, int64_t id) {
        const float with_noise = (float)((double)score + gumbel(word));
        if (with_noise > total || (with_noise == total && id < token)) total = with_noise, token = id;
    }
};

constexpr int BLOCKS = 8;  // of Philox, side by side: 32 tokens

#if defined(__AVX512F__) && defined(__AVX512BW__)
// Words of 8 blocks: out[word][block], each in the low half of 64 bits.
inline void philox8(uint64_t seed, uint64_t thread, uint64_t position, uint32_t block, __m512i* out) {
    const __m512i low = _mm512_set1_epi64(0xFFFFFFFF), m0 = _mm512_set1_epi64(0xD2511F53u),
                  m1 = _mm512_set1_epi64(0xCD9E8D57u);
    __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(block), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    __m512i c1 = _mm512_set1_epi64((uint32_t)position), c2 = _mm512_set1_epi64((uint32_t)thread),
            c3 = _mm512_set1_epi64((uint32_t)(thread >> 32));
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
        c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), 0x96), c1 = p1;
        c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), 0x96), c3 = p0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    const __m512i all[4] = {c0, c1, c2, c3};
    for (int i = 0; i < 4; i++) out[i] = _mm512_and_si512(all[i], low);
}
inline void words32(uint64_t seed, uint64_t thread, uint64_t position, uint32_t block, uint32_t* out) {
    __m512i w[4];
    philox8(seed, thread, position, block, w);
    // (w0 | w1 << 32) of block b is out[4 b], out[4 b + 1].
    const __m512i a = _mm512_or_si512(w[0], _mm512_slli_epi64(w[1], 32)), b = _mm512_or_si512(w[2], _mm512_slli_epi64(w[3], 32));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b));
    _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b));
}
#else
inline void words32(uint64_t seed, uint64_t thread, uint64_t position, uint32_t block, uint32_t* out) {
    // Lane by lane, which compilers turn into vectors.
    uint32_t c0[BLOCKS], c1[BLOCKS], c2[BLOCKS], c3[BLOCKS], k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int b = 0; b < BLOCKS; b++)
        c0[b] = block + b, c1[b] = (uint32_t)position, c2[b] = (uint32_t)thread, c3[b] = (uint32_t)(thread >> 32);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int b = 0; b < BLOCKS; b++) {
            const uint64_t p0 = (uint64_t)c0[b] * 0xD2511F53u, p1 = (uint64_t)c2[b] * 0xCD9E8D57u;
            c0[b] = (uint32_t)(p1 >> 32) ^ c1[b] ^ k0, c1[b] = (uint32_t)p1;
            c2[b] = (uint32_t)(p0 >> 32) ^ c3[b] ^ k1, c3[b] = (uint32_t)p0;
        }
    for (int b = 0; b < BLOCKS; b++)
        out[4 * b] = c0[b], out[4 * b + 1] = c1[b], out[4 * b + 2] = c2[b], out[4 * b + 3] = c3[b];
}
#endif

// Not below the noise of these words: -log(-log u) <= -log(1 - u), and the logarithm by its exponent and a chord, which
// lies below it.
inline vf most_noise(const uint32_t* words) {
    vi bits;
    std::memcpy(&bits, words, sizeof bits);
    bits = ~bits;  // 1 - u = (~word + 0.5) / 2^32
    typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
    vu unsigned_bits;
    std::memcpy(&unsigned_bits, &bits, sizeof bits);
    const vf rest = __builtin_convertvector(unsigned_bits, vf) + 0.5f;
    vi exponent;
    std::memcpy(&exponent, &rest, sizeof rest);
    vi mantissa = (exponent & 0x7FFFFF) | 0x3F800000;
    vf fraction;
    std::memcpy(&fraction, &mantissa, sizeof mantissa);
    const vf log2 = __builtin_convertvector((exponent >> 23) - 127 - 32, vf) + (fraction - 1.f);
    return log2 * -0.69314718f + 1e-3f;
}

// One row's scores on their way: all of the vocabulary, or a list of the tokens that are left.
class Scores {
   public:
    Scores(const Choices& all, std::vector<float>& dense) : all_(all), dense_(dense) {}

    int64_t choose(const Choice& row) {
        const Recipe& recipe = all_.recipes[row.recipe];
        logits_ = all_.logits + row.place * all_.vocabulary;
        size_ = all_.vocabulary, listed_ = copied_ = false;
        for (int i = 0; i < recipe.count; i++) apply(recipe.operations[i], row);
        return recipe.sampled ? sampled(recipe.seed, row.key, row.position) : likeliest();
    }

   private:
    const float* scores() const { return listed_ ? values_.data() : copied_ ? dense_.data() : logits_; }
    int64_t id(int i) const { return listed_ ? ids_[i] : i; }
    float* own() {  // scores to be written to
        if (listed_) return values_.data();
        if (!copied_) std::memcpy(dense_.data(), logits_, sizeof(float) * size_);
        copied_ = true;
        return dense_.data();
    }
    // Where a token's score is, or null where it is impossible already.
    float* at(int64_t token) {
        if (token < 0 || token >= all_.vocabulary) return nullptr;
        float* s = own();
        if (!listed_) return s + token;
        const auto found = std::lower_bound(ids_.begin(), ids_.end(), (int32_t)token);
        return found != ids_.end() && *found == token ? s + (found - ids_.begin()) : nullptr;
    }
    void ban(int64_t token) {
        if (float* score = at(token)) *score = -INFINITY;
    }

    int64_t length_of(const Choice& row) const {
        int64_t length = row.length;
        for (const Choice* at = &row; at->parent >= 0; at = all_.rows + at->parent) length++;
        return length;
    }
    // Calls use(token) for a row's path without its first tokens, the last one first.
    template <class Use>
    void along_path(const Choice& row, int64_t first, Use use) const {
        int64_t length = length_of(row);
        for (const Choice* at = &row; at->parent >= 0 && length > first; at = all_.rows + at->parent, length--)
            use(at->token);
        for (length = std::min(length, row.length); length > first; length--) use(all_.paths[row.path + length - 1]);
    }

    void apply(const Operation& o, const Choice& row) {
        switch (o.kind) {
            case REPETITION:
                penalise(row, o.length, o.value);
                break;
            case BIAS:
                for (int i = 0; i < o.count; i++)
                    if (float* score = at(o.ids[i])) *score += o.values[i];
                break;
            case MIN_LENGTH:
                if (length_of(row) >= o.length) break;
                [[fallthrough]];
            case SUPPRESS:
                for (int i = 0; i < o.count; i++) ban(o.ids[i]);
                break;
            case BANS:
                if (row.fork_banned) ban(o.ids[0]);
                ban(o.ids[1]);
                break;
            case TEMPERATURE: {
                const float* from = scores();
                float* to = listed_ ? values_.data() : dense_.data();
                int i = 0;
                for (; i + LANES <= size_; i += LANES) store(to + i, load(from + i) / splat(o.value));
                for (; i < size_; i++) to[i] = from[i] / o.value;
                copied_ = true;
                break;
            }
            case TOP_K:
                if (o.length < size_) keep_above(kth_largest(std::max(o.length, 1)));
                break;
            case TOP_P:
                top_p(o.value, o.length);
                break;
            case MIN_P:
                min_p(o.value);
                break;
            case TYPICAL:
                typical(o.value, o.length);
                break;
        }
    }

    void penalise(const Choice& row, int64_t first, float penalty) {
        held_.clear();
        along_path(row, first, [&](int64_t token) { held_.push_back(token); });
        std::sort(held_.begin(), held_.end());
        held_.erase(std::unique(held_.begin(), held_.end()), held_.end());
        for (const int64_t token : held_)
            if (float* score = at(token)) *score = *score < 0 ? *score * penalty : *score / penalty;
    }

    // The greatest score; NaN is none.
    float peak() const {
        const float* s = scores();
        float most = -INFINITY;
        int i = 0;
        vf peaks = splat(-INFINITY);
        for (; i + LANES <= size_; i += LANES) {
            const vf v = load(s + i);
            peaks = v > peaks ? v : peaks;
        }
        most = largest(peaks);
        for (; i < size_; i++)
            if (s[i] > most) most = s[i];
        return most;
    }

    float kth_largest(int k) {
        if (k <= 128) {
            found_.resize(k), found_values_.resize(k);
            top(scores(), size_, k, found_.data(), found_values_.data());
            return found_values_[k - 1];
        }
        sorted_.clear();
        for (int i = 0; i < size_; i++)
            if (scores()[i] > -INFINITY) sorted_.push_back(scores()[i]);
        if ((size_t)k > sorted_.size()) return -INFINITY;
        std::nth_element(sorted_.begin(), sorted_.begin() + (k - 1), sorted_.end(), std::greater<float>());
        return sorted_[k - 1];
    }

    // Leaves the tokens whose score is `limit` or more.
    void keep_above(float limit) {
        const float* s = scores();
        kept_ids_.clear(), kept_values_.clear();
        int i = 0;
        const auto see = [&](int k) {
            if (s[k] >= limit) kept_ids_.push_back((int32_t)id(k)), kept_values_.push_back(s[k]);
        };
        const float below = std::nextafter(limit, -INFINITY);
        if (limit > -INFINITY)
            for (; i + 4 * LANES <= size_; i += 4 * LANES) {
                bool above = false;
                for (int k = 0; k < 4; k++) above |= any_above(load(s + i + k * LANES), below);
                if (above)
                    for (int k = i; k < i + 4 * LANES; k++) see(k);
            }
        for (; i < size_; i++) see(i);
        take_kept();
    }
    void take_kept() {
        ids_.swap(kept_ids_), values_.swap(kept_values_);
        size_ = (int)ids_.size(), listed_ = true;
    }

    // Leaves these places, in ascending order.
    void keep(std::vector<int32_t>& places) {
        std::sort(places.begin(), places.end());
        kept_ids_.clear(), kept_values_.clear();
        for (const int32_t place : places)
            kept_ids_.push_back((int32_t)id(place)), kept_values_.push_back(scores()[place]);
        take_kept();
    }

    // The sum of e^(score - most), and of that times (score - most) where it is asked.
    double mass(float most) const {
        const float* s = scores();
        double total = 0;
        int i = 0;
        for (; i + LANES <= size_;) {  // in parts, so that floats are exact enough
            vf part = {};
            for (const int end = std::min(size_ / LANES * LANES, i + 64 * LANES); i < end; i += LANES) {
                const vf v = load(s + i), e = exp(v - most);
                part += v > splat(-INFINITY) ? e : vf{};
            }
            total += sum(part);
        }
        for (; i < size_; i++)
            if (s[i] > -INFINITY) total += std::exp(s[i] - most);
        return total;
    }

    void top_p(float p, int least) {
        const float most = peak();
        if (!(most > -INFINITY) || most == INFINITY || p >= 1) return;
        const float* s = scores();
        const double wanted = (double)p * mass(most);
        // The likeliest first: all within a distance of the best, and twice as far while they are too few.
        for (float distance = 6;; distance *= 2) {
            order_.clear();
            const float limit = distance > 200 ? -INFINITY : most - distance;
            for (int i = 0; i < size_; i++)
                if (s[i] > limit) order_.push_back(i);
            std::sort(order_.begin(), order_.end(),
                      [&](int32_t a, int32_t b) { return s[a] != s[b] ? s[a] > s[b] : a > b; });
            double before = 0;
            size_t kept = 0;
            while (kept < order_.size() && (before < wanted || kept < (size_t)least))
                before += std::exp((double)s[order_[kept++]] - most);
            if ((before >= wanted && kept >= (size_t)least) || limit == -INFINITY) {
                order_.resize(kept);
                return keep(order_);
            }
        }
    }

    void min_p(float share) {
        const float most = peak();
        if (!(most > -INFINITY) || most == INFINITY) return;
        keep_above(most + std::log(share));
    }

    void typical(float share, int least) {
        const float most = peak();
        if (!(most > -INFINITY) || most == INFINITY) return;
        const float* s = scores();
        // In float32 where transformers is: equals are to be equals.
        const float log_total = (float)(std::log(mass(most)) + most);
        double sum_of = 0;
        for (int i = 0; i < size_; i++)
            if (s[i] > -INFINITY) sum_of -= std::exp((double)s[i] - log_total) * (s[i] - log_total);
        const float entropy = (float)sum_of;
        order_.clear(), sorted_.resize(size_);
        for (int i = 0; i < size_; i++)
            if (s[i] > -INFINITY) {
                sorted_[i] = std::fabs((log_total - s[i]) - entropy);
                order_.push_back(i);
            }
        std::sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) {
            return sorted_[a] != sorted_[b] ? sorted_[a] < sorted_[b] : a < b;
        });
        double held = 0;
        size_t kept = 0;
        while (kept < order_.size() && (held < share || kept < (size_t)least))
            held += std::exp(s[order_[kept++]] - log_total);
        while (kept < order_.size() && sorted_[order_[kept]] == sorted_[order_[kept - 1]]) kept++;  // equals stay
        order_.resize(kept);
        keep(order_);
    }

    int64_t likeliest() const {
        const float* s = scores();
        const float most = peak();
        if (!(most > -INFINITY)) return -1;
        for (int i = 0;; i++)
            if (s[i] == most) return id(i);
    }

    int64_t sampled(uint64_t seed, uint64_t thread, uint64_t position) const {
        const float* s = scores();
        const float most = peak();
        if (!(most > -INFINITY)) return -1;
        Best best;
        uint32_t words[4 * BLOCKS];
        if (listed_ || size_ < 4 * BLOCKS) {
            for (int i = 0; i < size_; i++) {
                // Infinite ones are compared as they are, whatever the noise.
                if (!(s[i] > -INFINITY) || s[i] + MOST_NOISE < best.total) continue;
                philox(seed, thread, position, (uint32_t)(id(i) / 4), words);
                best.see(s[i], words[id(i) % 4], id(i));
            }
            return best.token;
        }
        // The likeliest without noise first: most others cannot reach it.
        const int64_t first = likeliest();
        philox(seed, thread, position, (uint32_t)(first / 4), words);
        best.see(s[first], words[first % 4], first);
        int i = 0;
        for (; i + 4 * BLOCKS <= size_; i += 4 * BLOCKS) {
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
        for (; i < size_; i++)
            if (s[i] > -INFINITY) {
                philox(seed, thread, position, (uint32_t)(i / 4), words);
                best.see(s[i], words[i % 4], i);
            }
        return best.token;
    }

    const Choices& all_;
    std::vector<float>& dense_;
    const float* logits_ = nullptr;
    int size_ = 0;
    bool listed_ = false, copied_ = false;
    std::vector<int32_t> ids_, kept_ids_, order_;
    std::vector<float> values_, kept_values_, sorted_, found_values_;
    std::vector<int64_t> held_, found_;
};

// In a parallel region: rows go to whichever thread is free, since some take ten times as long as others.
inline void choose(const Choices& all) {
    static thread_local std::vector<float> dense;
    dense.resize(std::max(dense.size(), (size_t)all.vocabulary));
    Scores scores(all, dense);
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < all.count; i++) all.tokens[i] = scores.choose(all.rows[i]);
}

}  // namespace mapar
