// `product`, or with ATTENTION `attend`, as a program, for tests/support/arm.py: an emulator runs it.
//
// It reads calls from stdin until that ends: a number of operands, and each operand's size in front of its bytes. What a
// call makes goes to stdout.
#include <cstdio>
#include <vector>

#ifdef ATTENTION
#include "attend.cpp"
#else
#include "multiply.cpp"
#endif

using Bytes = std::vector<char>;

template <class T>
static T* as(Bytes& bytes) {
    return bytes.empty() ? nullptr : (T*)bytes.data();
}

static bool take(void* to, size_t size) { return fread(to, 1, size, stdin) == size; }
static void give(const void* from, size_t size) { fwrite(from, 1, size, stdout); }

#ifdef ATTENTION
// Heads, {capacity, rows, longest, whether the pool is of steps}, keys, values, paths, lengths, queries
static void call(std::vector<Bytes>& in) {
    const Heads& h = *as<Heads>(in[0]);
    const int32_t* n = as<int32_t>(in[1]);
    const size_t slots = (size_t)n[0] * h.kv_heads, size = slots * h.head_dim * (n[3] ? sizeof(int16_t) : sizeof(float));
    Bytes keys(size), values(size);
    std::vector<float> scales(2 * slots), out(in[6].size() / sizeof(float));
    const Pool pool{keys.data(), values.data(), n[3] ? scales.data() : nullptr};
    attend(&h, &pool, n[0], as<float>(in[2]), as<float>(in[3]), n[1], n[2], as<int32_t>(in[4]), as<int>(in[5]),
           as<float>(in[6]), out.data());
    give(out.data(), sizeof(float) * out.size());
    give(keys.data(), size);
    give(values.data(), size);
    give(scales.data(), sizeof(float) * scales.size());
}
#else
// {kind, outputs, inputs, rows, width, outputs that are wanted}, panels, scales, bias, x
static void call(std::vector<Bytes>& in) {
    const int32_t* n = as<int32_t>(in[0]);
    const Matrix m{n[0], n[1], n[2], as<void>(in[1]), as<float>(in[2]), as<float>(in[3])};
    const int rows = n[3], outputs = n[5];
    std::vector<float> y((size_t)rows * outputs), steps((size_t)rows * m.inputs);
    std::vector<Group> groups((size_t)rows * (m.inputs / GROUP_INPUTS + 1));
    product(&m, as<float>(in[4]), rows, n[4], y.data(), outputs, (int8_t*)steps.data(), groups.data());
    give(y.data(), sizeof(float) * y.size());
}
#endif

int main() {
    for (int32_t count; take(&count, sizeof count);) {
        std::vector<Bytes> operands(count);
        for (Bytes& operand : operands) {
            int64_t size;
            if (!take(&size, sizeof size)) return 1;
            operand.resize(size);
            if (!take(operand.data(), size)) return 1;
        }
        call(operands);
    }
}
