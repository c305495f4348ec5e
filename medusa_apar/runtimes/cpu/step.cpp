// One forward pass of a decoder over a forest, in one parallel region: what eager transformers does in some
// thousand operators. Called through ctypes by `runtime.py`, which owns all memory; the structs are mirrored there.
#include "choose.h"
#include "crowd.h"
#include "eagle3.h"
#include "hydra.h"
#include "layer_pass.h"
#include "pack.h"
#include "top.h"
#include "weight_fingerprint.h"

#include <cfloat>

using namespace mapar;

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// How many doubles `Step.seconds` has.
EXPORTED int mapar_phases() { return PHASES; }
// Bytes of a struct, so that its mirror can be compared.
EXPORTED int mapar_sizes(int which) {
    const int sizes[] = {sizeof(Matrix), sizeof(Layer), sizeof(Model), sizeof(Step),
                         sizeof(Hydra),  sizeof(Tree),  sizeof(Span),
                         sizeof(Operation), sizeof(Recipe), sizeof(Choice), sizeof(Choices),
                         sizeof(Eagle3), sizeof(Written), sizeof(NewRows)};
    return sizes[which];
}

// Returns 0, or 1 where a token is none of the vocabulary and nothing was done.
EXPORTED int mapar_step(const Model* model, const Step* step, int threads, int outputs) {
    const Model& m = *model;
    const Step& s = *step;
    for (int r = 0; r < s.rows; r++)
        if (s.tokens[r] < 0 || s.tokens[r] >= m.vocabulary) return 1;
    Barrier barrier;
    Watch watch(threads);
#pragma omp parallel num_threads(watch.team)
    {
        watch.began();
        Clock clock{s.seconds};
        Blocks blocks(m.heads, s.rows, s.longest);
        const Share rows = share(s.rows), verified = share(s.verified);
        for (int r = rows.first; r < rows.last; r++)  // each thread those that it normalises first
            for (int i = 0; i < m.hidden; i += LANES)
                store(s.x + (size_t)r * m.hidden + i,
                      embedded(m.table, m.table_kind, s.tokens[r] * m.hidden + i) * m.embedding_scale);
        const int width = (1 + s.aux_layers) * m.hidden;
        for (int l = 0; l < m.layers; l++) {
            if (m.layer[l].pool.scales)
                LayerPass<StepCache>{m, m.layer[l], s, blocks, barrier, clock}.run();
            else
                LayerPass<FloatCache>{m, m.layer[l], s, blocks, barrier, clock}.run();
            if (m.layer[l].aux_layer >= 0)
                for (int r = verified.first; r < verified.last; r++)
                    unit_norm(s.x + s.verified_rows[r] * m.hidden, m.hidden, FLT_EPSILON,
                              s.hidden + (size_t)r * width + (1 + m.layer[l].aux_layer) * m.hidden);
            if (m.layer[l].boundary >= 0)
                for (int r = rows.first; r < rows.last; r++)
                    std::memcpy(s.states + ((size_t)r * s.boundaries + m.layer[l].boundary) * m.hidden,
                                s.x + (size_t)r * m.hidden, m.hidden * sizeof(float));
        }
        for (int r = verified.first; r < verified.last; r++) {
            float* out = s.hidden + (size_t)r * width;
            rms_norm(s.x + s.verified_rows[r] * m.hidden, m.norm, m.hidden, m.eps, out);
            prepare(m.unembedding, out, m.hidden, r, s.act);
        }
        barrier.wait();
        clock.end(NORM);
        multiply(m.unembedding, rows_for(m.unembedding, s.hidden, width, s.act), s.verified, s.logits,
                 outputs, outputs);
        if (m.logit_scale != 1 || m.logit_cap > 0) finish_logits(m, s, outputs);
        barrier.wait();
        clock.end(UNEMBED);
        watch.ended();
    }
    return 0;
}

// y = x W^T + b for one matrix: x [rows][width], y [rows][outputs]; steps and groups are scratch as in Step.
EXPORTED void mapar_linear(const Matrix* matrix, const float* x, int rows, int width, float* y, int outputs,
                           int8_t* steps, Group* groups, int threads) {
    const Matrix& m = *matrix;
    const Quantised act{steps, groups};
    Barrier barrier;
#pragma omp parallel num_threads(crowd().team_of(threads))
    {
        const Share mine = share(rows);
        for (int r = mine.first; r < mine.last; r++) prepare(m, x + (size_t)r * width, width, r, act);
        barrier.wait();
        multiply(m, rows_for(m, x, width, act), rows, y, outputs, outputs);
    }
}

// The `count` largest of each row, as of `top`: indices and values [rows][count]; and the logarithm of the sum of all
// exponentials, [rows], unless that is null. places: of the rows among x, null for the first ones.
EXPORTED void mapar_top(const float* x, const int64_t* places, int rows, int width, int count, int64_t* indices,
                        float* values, double* sums, int threads) {
// Never fewer than before but one: OpenMP would end the surplus threads and make them anew at the next step.
#pragma omp parallel num_threads(rows > 1 ? crowd().team_of(threads) : 1)
    {
        const Share mine = share(rows);
        for (int r = mine.first; r < mine.last; r++) {
            const float* row = x + (size_t)(places ? places[r] : r) * width;
            top(row, width, count, indices + (size_t)r * count, values + (size_t)r * count);
            if (sums) sums[r] = log_sum(row, width, values[(size_t)r * count]);
        }
    }
}

// Writes the token that each row of `choices` chooses.
EXPORTED void mapar_choose(const Choices* choices, int threads) {
#pragma omp parallel num_threads(choices->count > 1 ? crowd().team_of(threads) : 1)
    choose(*choices);
}

// Tokens and their log-probabilities for the nodes of `tree` below each of `roots`: ids and log_probs [roots][nodes].
// Returns 0, or 1 where a root is none of the base's tokens and nothing was done.
EXPORTED int mapar_hydra(const Hydra* heads, const Tree* tree, const float* states, const int64_t* roots, int count,
                         float least, int64_t* ids, float* log_probs, int threads) {
    for (int t = 0; t < count; t++)
        if (roots[t] < 0 || roots[t] >= heads->tokens) return 1;
    propose(*heads, *tree, states, roots, count, least, {ids, log_probs}, crowd().team_of(threads));
    return 0;
}

// The same with a drafter that attends to what was written.
EXPORTED int mapar_eagle3(const Eagle3* drafter, const Tree* tree, const Written* written, const int64_t* roots,
                          int count, float least, int64_t* ids, float* log_probs, int threads) {
    for (int t = 0; t < count; t++)
        if (roots[t] < 0 || roots[t] >= drafter->model.vocabulary) return 1;
    propose(*drafter, *tree, *written, roots, count, least, {ids, log_probs}, crowd().team_of(threads));
    return 0;
}

// What later drafts read of rows that a step has run. Returns 0, or 1 where a token is none of the base's and nothing was
// done.
EXPORTED int mapar_eagle3_rows(const Eagle3* drafter, const NewRows* rows, int threads) {
    for (int r = 0; r < rows->rows; r++)
        if (rows->tokens[r] < 0 || rows->tokens[r] >= drafter->model.vocabulary) return 1;
    keep_rows(*drafter, *rows, crowd().team_of(threads));
    return 0;
}

// Lays weights [outputs][inputs] out as int8 steps and their scales; kind: FLOAT32 or BFLOAT16.
EXPORTED void mapar_pack_int8(const void* weights, int kind, int outputs, int inputs, int8_t* panels, float* scales,
                              int threads) {
#pragma omp parallel num_threads(crowd().team_of(threads))
    if (kind == BFLOAT16)
        pack_int8_panels((const uint16_t*)weights, outputs, inputs, panels, scales);
    else
        pack_int8_panels((const float*)weights, outputs, inputs, panels, scales);
}

// Adds to sums[count][TURNS] those of `weight_fingerprint.h`, of one turn or, with -1, of all.
EXPORTED void mapar_sums(const Span* spans, int count, int turn, uint64_t* sums, int threads) {
#pragma omp parallel num_threads(crowd().team_of(threads))
    for (int i = 0; i < count; i++) add_sums(spans[i], turn, sums + (size_t)i * TURNS);
}
}
