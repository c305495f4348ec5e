// Drafting with Hydra heads (arXiv 2402.05109), or with heads that look at the state alone, level by level down a tree.
//
// What `heads/hydra.py` does in some hundred small operators, which took longer than their arithmetic.
#pragma once

#include <vector>

#include "product.h"
#include "top.h"

namespace mapar {

struct Hydra {
    int32_t heads, blocks, hidden, inputs;  // inputs: of the states
    int32_t vocabulary, tokens, table_kind; // of the draft, of the base; FLOAT32 or BFLOAT16
    float eps;                              // of the norm of embeddings
    const void* table;                      // the base's input embeddings [.][hidden]
    const int64_t* token_map;               // draft vocabulary -> vocabulary, or null
    Matrix states, unembedding;             // states: [heads][hidden]
    const Matrix* token;                    // [heads], token j for heads j and on; or null
    const Matrix* block;                    // [blocks][heads]
};

// A draft tree level by level; nodes and inner nodes of all levels one after the other.
struct Tree {
    int32_t levels, nodes;
    const int32_t *sizes, *inner_sizes, *top;  // [levels]; top: how many ranks are wanted
    const int32_t *node, *parent, *rank;       // [nodes]: number in the tree, place of the parent, rank
    const int32_t* inner;                      // places in their level of nodes that have children
};

// What the threads of one draft share. A level's rows are the nodes whose children are looked for.
struct Draft {
    const Hydra& h;
    const Tree& tree;
    int roots, most, rows;  // most rows of a level, and those of this one
    std::vector<float> sums, next, x, y, best;
    std::vector<int8_t> steps;
    std::vector<Group> groups;
    std::vector<float> reach, reach_next;  // [rows], log-probability of the path down to each
    std::vector<int> row, row_next, from;  // [roots][parents]: each parent's row, -1 where it is too unlikely; [rows]
    std::vector<int64_t> drafted, drafted_next, found;

    Draft(const Hydra& h, const Tree& tree, int roots) : h(h), tree(tree), roots(roots), rows(roots) {
        int parents = 1, ranks = 1;
        for (int l = 0; l < tree.levels; l++) {
            parents = std::max(parents, tree.inner_sizes[l]);
            ranks = std::max(ranks, tree.top[l]);
        }
        most = roots * parents;
        const size_t width = (size_t)h.heads * h.hidden, widest = std::max({(int)width, h.vocabulary, h.inputs});
        sums.resize(most * width), next.resize(most * width), x.resize((size_t)most * h.hidden);
        y.resize(most * widest);
        const size_t padded = std::max(h.inputs, h.hidden) / GROUP_INPUTS + 1;
        steps.resize(most * padded * GROUP_INPUTS * sizeof(float)), groups.resize(most * padded);
        best.resize((size_t)most * ranks), found.resize((size_t)most * ranks);
        drafted.resize(most), drafted_next.resize(most);
        reach.resize(most), reach_next.resize(most), row.resize(most), row_next.resize(most), from.resize(most);
        for (int t = 0; t < roots; t++) row[t] = t;
    }
};

// The first `outputs` of a matrix, a multiple of 16.
inline Matrix first_outputs(Matrix m, int outputs) {
    m.outputs = outputs;
    return m;
}

inline void embed(const Hydra& h, int64_t token, float* out) {
    vf squares = {};
    for (int i = 0; i < h.hidden; i += LANES) {
        const vf v = embedded(h.table, h.table_kind, (size_t)token * h.hidden + i);
        store(out + i, v);
        squares += v * v;
    }
    const vf scale = splat(1.f / std::sqrt(sum(squares) / h.hidden + h.eps));
    for (int i = 0; i < h.hidden; i += LANES) store(out + i, load(out + i) * scale);
}

// y = m x for all rows; rows are quantised first where the matrix wants that.
inline void product(Draft& d, const Matrix& m, const float* x, int stride, int inputs, int rows, float* y, int y_stride,
                    int outputs, Barrier& barrier) {
    const Quantised act{d.steps.data(), d.groups.data()};
    if (m.kind != FLOAT32) {
        const Share mine = share(rows);
        for (int r = mine.first; r < mine.last; r++)
            prepare(m, x + (size_t)r * stride, inputs, r, act);
        barrier.wait();
    }
    multiply(m, rows_for(m, x, stride, act), rows, y, y_stride, outputs);
    barrier.wait();
}

inline void propose_level(Draft& d, int level, int rows, Barrier& barrier) {
    const Hydra& h = d.h;
    const int H = h.hidden, width = h.heads * H, left = (d.tree.levels - level) * H;
    const Share mine = share(rows);
    if (h.token) {
        for (int r = mine.first; r < mine.last; r++) embed(h, d.drafted[r], d.x.data() + (size_t)r * H);
        barrier.wait();
        product(d, first_outputs(h.token[level], left), d.x.data(), H, H, rows, d.y.data(), width, left, barrier);
        for (int r = mine.first; r < mine.last; r++) {
            float* sums = d.sums.data() + (size_t)r * width + level * H;
            const float* more = d.y.data() + (size_t)r * width;
            for (int i = 0; i < left; i += LANES) store(sums + i, load(sums + i) + load(more + i));
        }
    }
    for (int r = mine.first; r < mine.last; r++)
        std::memcpy(d.x.data() + (size_t)r * H, d.sums.data() + (size_t)r * width + level * H, sizeof(float) * H);
    barrier.wait();
    for (int b = 0; b < h.blocks; b++) {
        product(d, h.block[b * h.heads + level], d.x.data(), H, H, rows, d.y.data(), H, H, barrier);
        for (int r = mine.first; r < mine.last; r++)
            for (int i = 0; i < H; i += LANES) {
                float* x = d.x.data() + (size_t)r * H + i;
                const vf y = load(d.y.data() + (size_t)r * H + i);
                store(x, load(x) + y / (exp(-y) + 1.f));
            }
        barrier.wait();
    }
    product(d, h.unembedding, d.x.data(), H, H, rows, d.y.data(), h.vocabulary, h.vocabulary, barrier);
    const int count = d.tree.top[level];
    for (int r = mine.first; r < mine.last; r++) {
        const float* logits = d.y.data() + (size_t)r * h.vocabulary;
        float* best = d.best.data() + (size_t)r * count;
        top(logits, h.vocabulary, count, d.found.data() + (size_t)r * count, best);
        const float total = best[0] + std::log(sum_of_exponentials(logits, h.vocabulary, best[0]));
        for (int k = 0; k < count; k++) best[k] -= total;
    }
    barrier.wait();
}

// Gives the level's nodes their tokens and readies the rows of the next. Below a node that is less likely than `least`
// nothing is looked for: token -1, of no probability.
inline void descend(Draft& d, int level, int parents, int first, int first_inner, float least, int64_t* ids,
                    float* log_probs, Barrier& barrier) {
    const Tree& tree = d.tree;
    const int width = d.h.heads * d.h.hidden, count = tree.top[level], inner = tree.inner_sizes[level];
    const Share mine = share(d.roots);
    for (int t = mine.first; t < mine.last; t++) {
        for (int n = first; n < first + tree.sizes[level]; n++) {
            const int row = d.row[t * parents + tree.parent[n]];
            const size_t at = (size_t)std::max(row, 0) * count + tree.rank[n];
            const int64_t token = row < 0 ? -1 : d.found[at];
            ids[(size_t)t * tree.nodes + tree.node[n]] = d.h.token_map && row >= 0 ? d.h.token_map[token] : token;
            log_probs[(size_t)t * tree.nodes + tree.node[n]] = row < 0 ? -INFINITY : d.best[at];
        }
    }
    barrier.wait();
    if (!omp_get_thread_num()) {
        d.rows = 0;
        for (int t = 0; t < d.roots; t++)
            for (int i = 0; i < inner; i++) {
                const int n = first + tree.inner[first_inner + i], parent = d.row[t * parents + tree.parent[n]];
                const size_t node = (size_t)t * tree.nodes + tree.node[n];
                const float reach = parent < 0 ? -INFINITY : d.reach[parent] + log_probs[node];
                const bool likely = parent >= 0 && reach >= least;
                d.row_next[t * inner + i] = likely ? d.rows : -1;
                if (!likely) continue;
                d.from[d.rows] = parent, d.reach_next[d.rows] = reach, d.drafted_next[d.rows++] = ids[node];
            }
    }
    barrier.wait();
    const Share rows = share(d.rows);
    for (int r = rows.first; r < rows.last; r++)
        std::memcpy(d.next.data() + (size_t)r * width, d.sums.data() + (size_t)d.from[r] * width, sizeof(float) * width);
    barrier.wait();
}

inline void propose(const Hydra& h, const Tree& tree, const float* states, const int64_t* roots, int count,
                    float least, int64_t* ids, float* log_probs, int threads) {
    Draft d(h, tree, count);
    std::copy(roots, roots + count, d.drafted.begin());
    Barrier barrier;
#pragma omp parallel num_threads(threads)
    {
        const int used = tree.levels * h.hidden, width = h.heads * h.hidden;
        product(d, first_outputs(h.states, used), states, h.inputs, h.inputs, count, d.sums.data(), width, used, barrier);
        int parents = 1, first = 0, first_inner = 0;
        for (int level = 0; level < tree.levels; level++) {
            if (d.rows) propose_level(d, level, d.rows, barrier);
            descend(d, level, parents, first, first_inner, least, ids, log_probs, barrier);
            first += tree.sizes[level];
            first_inner += parents = tree.inner_sizes[level];
            if (!omp_get_thread_num()) {
                d.sums.swap(d.next);
                d.drafted.swap(d.drafted_next);
                d.reach.swap(d.reach_next);
                d.row.swap(d.row_next);
            }
            barrier.wait();
        }
    }
}

}  // namespace mapar
