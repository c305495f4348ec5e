// Drafting with Hydra heads (arXiv 2402.05109), or with heads that look at the state alone, level by level down a tree.
//
// What `heads/hydra.py` does in some hundred small operators, which took longer than their arithmetic.
#pragma once

#include "descent.h"
#include "product.h"

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

// What the threads of one draft share.
struct HydraDraft {
    const Hydra& h;
    Descent& down;
    std::vector<float> sums, next, x, y;  // a row: sums and next [heads][hidden], x [hidden], y whatever is made of it
    std::vector<int8_t> steps;
    std::vector<Group> groups;

    HydraDraft(const Hydra& h, Descent& down) : h(h), down(down) {
        const size_t most = down.most, width = (size_t)h.heads * h.hidden;
        const size_t widest = std::max({(int)width, h.vocabulary, h.inputs});
        sums.resize(most * width), next.resize(most * width), x.resize(most * h.hidden), y.resize(most * widest);
        const size_t padded = std::max(h.inputs, h.hidden) / GROUP_INPUTS + 1;
        steps.resize(most * padded * GROUP_INPUTS * sizeof(float)), groups.resize(most * padded);
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
inline void product(HydraDraft& d, const Matrix& m, const float* x, int stride, int inputs, int rows, float* y,
                    int y_stride, int outputs, Barrier& barrier) {
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

inline void propose_level(HydraDraft& d, Barrier& barrier) {
    const Hydra& h = d.h;
    const int H = h.hidden, width = h.heads * H, level = d.down.level, rows = d.down.rows;
    const int left = (d.down.tree.levels - level) * H;
    const Share mine = share(rows);
    if (h.token) {
        for (int r = mine.first; r < mine.last; r++) embed(h, d.down.tokens[r], d.x.data() + (size_t)r * H);
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
    d.down.look(d.y.data(), h.vocabulary);
    barrier.wait();
}

inline void propose(const Hydra& h, const Tree& tree, const float* states, const int64_t* roots, int count,
                    float least, const Drafted& out, int threads) {
    Descent down(tree, roots, count);
    HydraDraft d(h, down);
    Barrier barrier;
#pragma omp parallel num_threads(threads)
    {
        const int used = tree.levels * h.hidden, width = h.heads * h.hidden;
        product(d, first_outputs(h.states, used), states, h.inputs, h.inputs, count, d.sums.data(), width, used, barrier);
        for (int level = 0; level < tree.levels; level++) {
            if (down.rows) propose_level(d, barrier);
            down.choose(least, h.token_map, out, barrier);
            const Share rows = share(down.next_rows);
            for (int r = rows.first; r < rows.last; r++)
                std::memcpy(d.next.data() + (size_t)r * width, d.sums.data() + (size_t)down.from[r] * width,
                            sizeof(float) * width);
            barrier.wait();
            if (!omp_get_thread_num()) d.sums.swap(d.next), down.go_down();
            barrier.wait();
        }
    }
}

}  // namespace mapar
