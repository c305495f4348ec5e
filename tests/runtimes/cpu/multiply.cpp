// int8 products by themselves, for test_matrix.py: compiled for one instruction set after the other.
#include "product.h"

using namespace mapar;

// y [rows][outputs] of x [rows][width]; steps and groups are scratch.
extern "C" void product(const Matrix* m, const float* x, int rows, int width, float* y, int outputs, int8_t* steps,
                        Group* groups) {
    const Quantised act{steps, groups};
    for (int r = 0; r < rows; r++) prepare(*m, x + (size_t)r * width, width, r, act);
    multiply(*m, rows_for(*m, x, width, act), rows, y, outputs, outputs);
}
