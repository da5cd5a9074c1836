// matrix.h: mma.sync and ldmatrix. Lane 4 g + t holds, as the PTX manual has it for m16n8k16,
// A: rows g, g + 8, columns 2t.. and 2t + 8..; B: rows 2t.. and 2t + 8.., column g; C and D: rows
// g, g + 8, columns 2t, 2t + 1.
#pragma once

namespace emu {

typedef float Floats __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));

EMU_OWN inline Floats low_halves(Words pairs) { return (Floats)(pairs << 16); }
EMU_OWN inline Floats high_halves(Words pairs) { return (Floats)(pairs & 0xffff0000u); }

// Sums in order of k, each product and sum rounded; a tensor core adds in an order of its own.
EMU_OWN inline void mma_lanes(Warp& w, uint32_t, const void*) {
    Words a[16], b[8], d[16];  // a[row], b[k / 2]: pairs along k; d[row]
    for (int l = 0; l < WARP; l++) {
        const int g = l >> 2, t = l & 3;
        const uint32_t* r = w.in[l];
        a[g][t] = r[0], a[g + 8][t] = r[1], a[g][t + 4] = r[2], a[g + 8][t + 4] = r[3];
        b[t][g] = r[4], b[t + 4][g] = r[5];
        d[g][2 * t] = r[6], d[g][2 * t + 1] = r[7];
        d[g + 8][2 * t] = r[8], d[g + 8][2 * t + 1] = r[9];
    }
    for (int i = 0; i < 16; i++) {
        Floats sum = (Floats)d[i];
        const Floats low = low_halves(a[i]), high = high_halves(a[i]);
        for (int k = 0; k < 8; k++) {
            sum += low[k] * low_halves(b[k]);
            sum += high[k] * high_halves(b[k]);
        }
        d[i] = (Words)sum;
    }
    for (int l = 0; l < WARP; l++) {
        const int g = l >> 2, t = 2 * (l & 3);
        w.out[l][0] = d[g][t], w.out[l][1] = d[g][t + 1];
        w.out[l][2] = d[g + 8][t], w.out[l][3] = d[g + 8][t + 1];
    }
}

EMU_OWN inline uint32_t half_word(const Warp& w, int matrix, int row, int column) {
    return w.in[8 * matrix + row][column >> 1] >> (16 * (column & 1)) & 0xffffu;
}
EMU_OWN inline void ldmatrix_lanes(Warp& w, uint32_t, const void* how) {  // in[l]: the row l named
    const bool transposed = *static_cast<const bool*>(how);
    for (int l = 0; l < WARP; l++)
        for (int m = 0; m < 4; m++) {
            const int row = l >> 2, column = 2 * (l & 3);
            w.out[l][m] = transposed
                ? half_word(w, m, column, row) | half_word(w, m, column + 1, row) << 16
                : half_word(w, m, row, column) | half_word(w, m, row, column + 1) << 16;
        }
}
inline void ldmatrix(const char* op, uint32_t* r, const void* row, bool transposed, int line) {
    check_shared(op, line, row, 16);
    uint32_t in[4];
    memcpy(in, row, sizeof in);  // each lane reads the row it names, and answers for it
    warp_op(op, line, 0xffffffffu, in, 4, r, 4, ldmatrix_lanes, &transposed);
}

}  // namespace emu
