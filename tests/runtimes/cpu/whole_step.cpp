// A step of a small model of numbers that are random and everywhere the same, and what is chosen of its logits, as a
// program for test_arm.py: compiled for two processors it comes to the same.
//
// Arguments: the weights' kind, and whether the pool keeps steps. To stdout: hidden states and logits in float32, the
// tokens chosen and the likeliest ones in int64.
#include "step.cpp"

#include <cstdio>
#include <cstdlib>
#include <deque>

constexpr int LAYERS = 2, HIDDEN = 128, INNER = 192, VOCABULARY = 80, ROWS = 9, WIDEST = 1024, THREADS = 2, LIKELIEST = 4;
constexpr Heads HEADS{4, 2, 32, 0.18f, 0};

class Numbers {
   public:
    // In [-scale, scale).
    float next(float scale) {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return scale * (int32_t)(state_ >> 32) * 0x1p-31f;
    }
    // As long as this object is there.
    float* floats(size_t count, float scale, float around = 0) {
        kept_.emplace_back(count);
        for (float& x : kept_.back()) x = around + next(scale);
        return kept_.back().data();
    }
    void* zeros(size_t count) { return floats(count, 0); }
    Matrix matrix(int kind, int outputs, int inputs) {
        const float scale = std::sqrt(3.f / inputs);
        const size_t count = (size_t)outputs * inputs;
        if (kind == FLOAT32) return {kind, outputs, inputs, floats(count, scale), nullptr, nullptr};
        if (kind == BFLOAT16) {
            auto* halves = (uint16_t*)zeros(count / 2);
            for (size_t i = 0; i < count; i++) {
                const float x = next(scale);
                std::memcpy(halves + i, (const char*)&x + 2, 2);
            }
            return {kind, outputs, inputs, halves, nullptr, nullptr};
        }
        auto* steps = (int8_t*)zeros(count / 4);
        for (size_t i = 0; i < count; i++) steps[i] = (int8_t)next(127.5f);
        return {kind, outputs, inputs, steps, floats(count / GROUP_INPUTS, scale / 254, scale / 127), nullptr};
    }

   private:
    uint64_t state_ = 1;
    std::deque<std::vector<float>> kept_;
};

int main(int, char** arguments) {
    const int kind = std::atoi(arguments[1]), in_steps = std::atoi(arguments[2]);
    Numbers numbers;
    const int q_width = HEADS.heads * HEADS.head_dim, width = q_width + 2 * HEADS.kv_heads * HEADS.head_dim;
    const size_t pool_size = (size_t)ROWS * HEADS.kv_heads * HEADS.head_dim;
    std::vector<Layer> layers;
    for (int l = 0; l < LAYERS; l++)
        layers.push_back({numbers.floats(HIDDEN, 0.1f, 1), nullptr, numbers.floats(HIDDEN, 0.1f, 1), nullptr,
                          numbers.floats(HEADS.head_dim, 0.1f, 1), nullptr, numbers.matrix(kind, width, HIDDEN),
                          numbers.matrix(kind, HIDDEN, q_width), numbers.matrix(kind, 2 * INNER, HIDDEN),
                          numbers.matrix(kind, HIDDEN, INNER),
                          {numbers.zeros(pool_size), numbers.zeros(pool_size),
                           in_steps ? (float*)numbers.zeros(2 * ROWS * HEADS.kv_heads) : nullptr},
                          0, -1, -1, 0});
    const Model model{LAYERS, HIDDEN, INNER, VOCABULARY, FLOAT32, HEADS.head_dim, 0, 0, HEADS, 1e-5f, 1, 1, 3, 0,
                      numbers.floats(HIDDEN, 0.1f, 1), numbers.floats((size_t)VOCABULARY * HIDDEN, 1), layers.data(),
                      numbers.matrix(kind, VOCABULARY, HIDDEN)};

    // Row r reads rows 0 to r, which lie in the pool the other way round.
    int64_t tokens[ROWS], positions[ROWS], slots[ROWS], verified[ROWS];
    int32_t slot_lists[ROWS];
    Run runs[3 * ROWS] = {};
    for (int r = 0; r < ROWS; r++) {
        tokens[r] = 7 * r % VOCABULARY, positions[r] = verified[r] = r, slots[r] = slot_lists[r] = ROWS - 1 - r;
        runs[3 * r] = {0, r + 1};
    }
    const float *cos = numbers.floats(ROWS * HEADS.head_dim, 1), *sin = numbers.floats(ROWS * HEADS.head_dim, 1);
    std::vector<float> hidden(ROWS * HIDDEN), logits(ROWS * VOCABULARY);
    std::vector<Group> groups(ROWS * WIDEST);
    const Step step{ROWS, ROWS, 0, 0, ROWS, tokens, {cos}, {sin}, positions, slots, slot_lists, runs, verified,
                    hidden.data(), nullptr, logits.data(), (float*)numbers.zeros(ROWS * WIDEST),
                    (float*)numbers.zeros(ROWS * WIDEST), (float*)numbers.zeros(ROWS * WIDEST),
                    {(int8_t*)numbers.zeros(ROWS * WIDEST), groups.data()}, nullptr};
    if (mapar_step(&model, &step, THREADS, VOCABULARY)) return 1;

    // The likeliest; one by its probability, at some temperature; one of the five likeliest.
    const Operation warmer{TEMPERATURE, 0, 0, 1.5f, nullptr, nullptr}, few{TOP_K, 0, 5, 0, nullptr, nullptr};
    const Recipe recipes[] = {{0, 0, 0, 0, nullptr}, {1, 1, 0, 3, &warmer}, {1, 1, 0, 4, &few}};
    Choice rows[ROWS];
    for (int r = 0; r < ROWS; r++) rows[r] = {r, r % 3, -1, 0, 0, 0, 5, r, 0, 0, -1};
    int64_t chosen[ROWS], likeliest[ROWS * LIKELIEST];
    float values[ROWS * LIKELIEST];
    const Choices choices{ROWS, VOCABULARY, rows, recipes, nullptr, logits.data(), nullptr, 0, chosen, nullptr, nullptr};
    mapar_choose(&choices, THREADS);
    mapar_top(logits.data(), nullptr, ROWS, VOCABULARY, LIKELIEST, likeliest, values, nullptr, THREADS);

    fwrite(hidden.data(), sizeof(float), hidden.size(), stdout);
    fwrite(logits.data(), sizeof(float), logits.size(), stdout);
    fwrite(chosen, sizeof *chosen, ROWS, stdout);
    fwrite(likeliest, sizeof *likeliest, ROWS * LIKELIEST, stdout);
}
