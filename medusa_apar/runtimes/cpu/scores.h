// A row's scores on their way from logits: what transformers' processors make of them, one operation after the other. They
// depend on nothing but the row's own logits and path.
//
// Operations that drop tokens leave a list of those that are left, so that what follows looks at few. NaN is no token's
// score here, while transformers' own filters may leave nothing, or too much, where one is.
#pragma once

#include <vector>

#include "top.h"

namespace mapar {

enum OperationKind : int32_t {
    REPETITION = 0,  // value: scores of tokens on the path, but for `length` first ones, are divided by it, or multiplied
                     // where they are negative
    PRESENCE_FREQUENCY,  // value: taken from the scores of tokens on the path, but for `length` first ones, as often as they
                         // stand there; and values[0] once; count ids cost nothing
    BIAS,            // ids, values: are added
    MIN_LENGTH,      // count ids are impossible while the path is shorter than `length`
    SUPPRESS,        // count ids are impossible
    HELD_BACK,       // count ids are impossible where the row's `held` has a bit of `length`
    MASK,            // tokens are impossible whose bit in the row's mask is 0
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

// What one request makes of logits. judged: its draft tokens are accepted by their probability, see `judge`.
struct Recipe {
    int32_t count, sampled, judged;
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
    int64_t held;  // bits of HELD_BACK
    int64_t mask;  // which of the masks is the row's, -1: none
};

struct Choices {
    int32_t count, vocabulary;
    const Choice* rows;
    const Recipe* recipes;
    const int64_t* paths;
    const float* logits;  // [rows][vocabulary]
    const uint32_t* masks;  // [masks][words], a bit a token, from the lowest on
    int64_t words;
    int64_t* tokens;      // [count], -1 where nothing is possible
    // Of judged recipes' rows, [count]: the log-probability of the draft token behind its parent, and the entropy of a
    // row that has draft tokens behind it.
    double *log_probs, *entropies;
};

// One row's: all of the vocabulary, or a list of the tokens that are left, in ascending order.
class Scores {
   public:
    Scores(const Choices& all, std::vector<float>& dense) : all_(all), dense_(dense) {}

    void make(const Choice& row) {
        const Recipe& recipe = all_.recipes[row.recipe];
        logits_ = all_.logits + row.place * all_.vocabulary;
        size_ = all_.vocabulary, listed_ = copied_ = false;
        for (int i = 0; i < recipe.count; i++) apply(recipe.operations[i], row);
    }

    bool listed() const { return listed_; }
    int size() const { return size_; }
    const float* scores() const { return listed_ ? values_.data() : copied_ ? dense_.data() : logits_; }
    int64_t id(int i) const { return listed_ ? ids_[i] : i; }
    // Where among them a token is, -1 where it is impossible already.
    int place(int64_t token) const {
        if (token < 0 || token >= all_.vocabulary) return -1;
        if (!listed_) return (int)token;
        const auto found = std::lower_bound(ids_.begin(), ids_.end(), (int32_t)token);
        return found != ids_.end() && *found == token ? (int)(found - ids_.begin()) : -1;
    }

   private:
    float* own() {  // scores to be written to
        if (listed_) return values_.data();
        if (!copied_) std::memcpy(dense_.data(), logits_, sizeof(float) * size_);
        copied_ = true;
        return dense_.data();
    }
    // Where a token's score is, or null where it is impossible already.
    float* at(int64_t token) {
        const int found = place(token);
        return found < 0 ? nullptr : own() + found;
    }
    void ban(int64_t token) {
        if (float* score = at(token)) *score = -INFINITY;
    }

    int64_t length_of(const Choice& row) const {
        int64_t length = row.length;
        for (const Choice* at = &row; at->parent >= 0; at = all_.rows + at->parent) length++;
        return length;
    }
    void apply(const Operation& o, const Choice& row) {
        switch (o.kind) {
            case REPETITION:
                penalise(row, o,
                         [&](float score, int) { return score < 0 ? score * o.value : score / o.value; });
                break;
            case PRESENCE_FREQUENCY:
                // The product of a float and a count is exact in float64: no machine can round it otherwise.
                penalise(row, o, [&](float score, int count) {
                    return score - (float)((double)o.value * count + (double)o.values[0]);
                });
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
            case HELD_BACK:
                for (int i = 0; i < o.count && (row.held & o.length); i++) ban(o.ids[i]);
                break;
            case MASK:
                if (row.mask >= 0) keep_masked(all_.masks + row.mask * all_.words);
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

    // The tokens of a path that an operation looks at, in ascending order, and how often each stands there.
    struct Counted {
        const Operation* operation;
        std::vector<std::pair<int64_t, int>> tokens;
    };
    // A segment's rows share their path, up to what is drafted: it is counted for the first of them that comes along.
    const Counted& counted(const Choice& row, const Operation& o) {
        if (row.path != counted_path_ || row.length != counted_length_) counted_.clear();
        counted_path_ = row.path, counted_length_ = row.length;
        for (const Counted& known : counted_)
            if (known.operation == &o) return known;
        held_.clear();
        for (int64_t i = o.length; i < row.length; i++) hold(o, all_.paths[row.path + i]);
        std::sort(held_.begin(), held_.end());
        counted_.push_back({&o, {}});
        for (int64_t token : held_) {
            auto& tokens = counted_.back().tokens;
            if (tokens.empty() || tokens.back().first != token) tokens.push_back({token, 0});
            tokens.back().second++;
        }
        return counted_.back();
    }
    void hold(const Operation& o, int64_t token) {
        const int64_t* end = o.ids + o.count;
        if (std::find(o.ids, end, token) == end) held_.push_back(token);
    }

    // What `use` makes of the score of each token on a row's path without its first ones, which stands there so often;
    // not of the operation's ids.
    template <class Use>
    void penalise(const Choice& row, const Operation& o, Use use) {
        const auto& tokens = counted(row, o).tokens;
        const auto change = [&](int64_t token, int count) {
            if (float* score = at(token)) *score = use(*score, count);
        };
        held_.clear();  // what is drafted of the path
        int64_t length = length_of(row);
        for (const Choice* at = &row; at->parent >= 0 && length > o.length; at = all_.rows + at->parent, length--)
            hold(o, at->token);
        for (const auto& [token, count] : tokens)
            change(token, count + (int)std::count(held_.begin(), held_.end(), token));
        for (auto token = held_.begin(); token != held_.end(); token++) {
            const auto found = std::lower_bound(tokens.begin(), tokens.end(), std::make_pair(*token, 0));
            if ((found != tokens.end() && found->first == *token) || std::find(held_.begin(), token, *token) != token)
                continue;
            change(*token, (int)std::count(token, held_.end(), *token));
        }
    }

    float kth_largest(int k) {
        if (k <= MOST_INSERTED) {
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

    // Leaves the tokens whose bit is 1. Where those are many it is cheaper to go on with a score for every token.
    void keep_masked(const uint32_t* mask) {
        const auto allowed = [&](int64_t token) { return mask[token / 32] >> (token % 32) & 1; };
        int64_t count = 0;
        for (int64_t word = 0; word < all_.words; word++) count += __builtin_popcount(mask[word]);
        if (!listed_ && count > all_.vocabulary / 8) {
            float* to = own();
            for (int word = 0; word * 32 < size_; word++)
                if (mask[word] != ~0u)
                    for (int i = word * 32; i < std::min(word * 32 + 32, size_); i++)
                        if (!allowed(i)) to[i] = -INFINITY;
            return;
        }
        kept_ids_.clear(), kept_values_.clear();
        const auto take = [&](int place) {
            kept_ids_.push_back((int32_t)id(place)), kept_values_.push_back(scores()[place]);
        };
        if (listed_) {
            for (int i = 0; i < size_; i++)
                if (allowed(id(i))) take(i);
        } else {
            for (int word = 0; word * 32 < size_; word++)
                for (uint32_t bits = mask[word]; bits; bits &= bits - 1)
                    if (const int i = word * 32 + __builtin_ctz(bits); i < size_) take(i);
        }
        take_kept();
    }

    // Leaves these places, in ascending order.
    void keep(std::vector<int32_t>& places) {
        std::sort(places.begin(), places.end());
        kept_ids_.clear(), kept_values_.clear();
        for (const int32_t place : places)
            kept_ids_.push_back((int32_t)id(place)), kept_values_.push_back(scores()[place]);
        take_kept();
    }

    void top_p(float p, int least) {
        const float most = peak(scores(), size_);
        if (!(most > -INFINITY) || most == INFINITY || p >= 1) return;
        const float* s = scores();
        const double wanted = (double)p * mass(s, size_, most);
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
        const float most = peak(scores(), size_);
        if (!(most > -INFINITY) || most == INFINITY) return;
        keep_above(most + std::log(share));
    }

    void typical(float share, int least) {
        const float most = peak(scores(), size_);
        if (!(most > -INFINITY) || most == INFINITY) return;
        const float* s = scores();
        // In float32 where transformers is: equals are to be equals.
        const float log_total = (float)(std::log(mass(s, size_, most)) + most);
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

    const Choices& all_;
    std::vector<float>& dense_;
    const float* logits_ = nullptr;
    int size_ = 0;
    bool listed_ = false, copied_ = false;
    std::vector<int32_t> ids_, kept_ids_, order_;
    std::vector<float> values_, kept_values_, sorted_, found_values_;
    std::vector<int64_t> held_, found_;
    std::vector<Counted> counted_;
    int64_t counted_path_ = -1, counted_length_ = -1;
};

}  // namespace mapar
