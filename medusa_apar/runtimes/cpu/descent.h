// Down a draft tree, level by level, below several roots at once: which rows a level has, and what its nodes become.
#pragma once

#include <vector>

#include "team.h"
#include "top.h"

namespace mapar {

// A draft tree level by level; nodes and inner nodes of all levels one after the other.
struct Tree {
    int32_t levels, nodes;
    const int32_t *sizes, *inner_sizes, *top;  // [levels]; top: how many ranks are wanted
    const int32_t *node, *parent, *rank;       // [nodes]: number in the tree, place of the parent, rank
    const int32_t* inner;                      // places in their level of nodes that have children
};

// What a draft puts out: of each root's nodes tokens and log-probabilities, [roots][nodes].
struct Drafted {
    int64_t* ids;
    float* log_probs;
};

// A level's rows are the nodes whose children are looked for; at first the roots.
struct Descent {
    const Tree& tree;
    int roots, most, rows;  // most rows of a level, and those of this one
    int level = 0;
    std::vector<int64_t> tokens;  // [rows]
    std::vector<int> from;        // of the next level's rows, once `choose` has been: the row that each comes from
    int next_rows = 0;

    Descent(const Tree& tree, const int64_t* ids, int roots) : tree(tree), roots(roots), rows(roots) {
        int parents = 1, ranks = 1;
        for (int l = 0; l < tree.levels; l++) {
            parents = std::max(parents, tree.inner_sizes[l]);
            ranks = std::max(ranks, tree.top[l]);
        }
        most = roots * parents;
        tokens.resize(most), tokens_next_.resize(most), from.resize(most);
        best_.resize((size_t)most * ranks), found_.resize((size_t)most * ranks);
        reach_.resize(most), reach_next_.resize(most), row_.resize(most), row_next_.resize(most);
        std::copy(ids, ids + roots, tokens.begin());
        for (int t = 0; t < roots; t++) row_[t] = t;
    }

    // The likeliest tokens behind each row, of logits [rows][vocabulary]. The threads of a region share the rows.
    void look(const float* all, int vocabulary) {
        const int count = tree.top[level];
        const Share mine = share(rows);
        for (int r = mine.first; r < mine.last; r++) {
            const float* logits = all + (size_t)r * vocabulary;
            float* best = best_.data() + (size_t)r * count;
            mapar::top(logits, vocabulary, count, found_.data() + (size_t)r * count, best);
            const float total = best[0] + std::log(sum_of_exponentials(logits, vocabulary, best[0]));
            for (int k = 0; k < count; k++) best[k] -= total;
        }
    }

    // Gives the level's nodes their tokens and finds the rows of the next. Below a node that is less likely than
    // `least` nothing is looked for: token -1, of no probability. For all threads of a region, behind a barrier.
    void choose(float least, const int64_t* token_map, const Drafted& out, Barrier& barrier) {
        const int count = tree.top[level], inner = tree.inner_sizes[level];
        const Share mine = share(roots);
        for (int t = mine.first; t < mine.last; t++)
            for (int n = first_; n < first_ + tree.sizes[level]; n++) {
                const int row = row_[t * parents_ + tree.parent[n]];
                const size_t at = (size_t)std::max(row, 0) * count + tree.rank[n];
                const size_t node = (size_t)t * tree.nodes + tree.node[n];
                const int64_t token = row < 0 ? -1 : found_[at];
                out.ids[node] = token_map && row >= 0 ? token_map[token] : token;
                out.log_probs[node] = row < 0 ? -INFINITY : best_[at];
            }
        barrier.wait();
        if (!omp_get_thread_num()) {
            next_rows = 0;
            for (int t = 0; t < roots; t++)
                for (int i = 0; i < inner; i++) {
                    const int n = first_ + tree.inner[first_inner_ + i], parent = row_[t * parents_ + tree.parent[n]];
                    const size_t node = (size_t)t * tree.nodes + tree.node[n];
                    const float reach = parent < 0 ? -INFINITY : reach_[parent] + out.log_probs[node];
                    const bool likely = parent >= 0 && reach >= least;
                    row_next_[t * inner + i] = likely ? next_rows : -1;
                    if (!likely) continue;
                    from[next_rows] = parent, reach_next_[next_rows] = reach, tokens_next_[next_rows++] = out.ids[node];
                }
        }
        barrier.wait();
    }

    // Goes on to the next level. For one thread, while the others wait.
    void go_down() {
        first_ += tree.sizes[level];
        first_inner_ += parents_ = tree.inner_sizes[level];
        tokens.swap(tokens_next_), reach_.swap(reach_next_), row_.swap(row_next_);
        rows = next_rows;
        level++;
    }

   private:
    int parents_ = 1, first_ = 0, first_inner_ = 0;  // of the level: rows' places of a root; first node and inner node
    std::vector<int64_t> tokens_next_, found_;
    std::vector<float> best_, reach_, reach_next_;  // reach: log-probability of the path down to a row
    std::vector<int> row_, row_next_;               // [roots][parents]: each parent's row, -1 where it is too unlikely
};

}  // namespace mapar
