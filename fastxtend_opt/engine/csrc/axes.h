// Helpers of kernels that reduce along axes. A chunk is `mats` matrices of `rows` rows of `n` elements.
// The kernel includes prelude.h and defines CT, the type that it computes in, before it includes this file.
#pragma once
#include <cstdlib>

static constexpr i64 BLK = 1024; // elements that a pass works on at a time

// A thread's memory for values along axes, kept from call to call.
template<class F> struct Buffer {
    F* p = nullptr; i64 n = 0;
    F* get(i64 m) { if (m > n) { std::free(p); p = (F*)std::malloc(m*sizeof(F)); n = m; } return p; }
    ~Buffer() { std::free(p); }
};
// Instantiated here, because GCC 12 leaves out a destructor that only a thread_local variable needs.
template struct Buffer<float>;
template struct Buffer<double>;

// Rows of 3 elements, as most convolutions have, get loops of that fixed length: ROWS_OF(3) is the body of such a function.
#define FIXED_LENGTHS(n) if (n == 3) { ROWS_OF(3) }

// Repeat a value per row over the elements of the row.
template<class S> static inline void fill_rows(CT* __restrict__ e, const S* __restrict__ s, i64 rows, i64 n) {
    #define ROWS_OF(N) for (i64 r = 0; r < rows; r++) { const CT v = CT(ld(s[r])); for (int c = 0; c < N; c++) e[r*N+c] = v; } return;
    FIXED_LENGTHS(n)
    #undef ROWS_OF
    for (i64 r = 0; r < rows; r++) { const CT v = CT(ld(s[r])); for (i64 c = 0; c < n; c++) e[r*n+c] = v; }
}

// Repeat a value per column over the rows of the matrix.
template<class S> static inline void fill_columns(CT* __restrict__ e, const S* __restrict__ s, i64 mats, i64 rows, i64 n) {
    #define ROWS_OF(N) for (i64 m = 0; m < mats; m++) { \
        for (i64 r = 0; r < rows; r++, e += N) { for (int c = 0; c < N; c++) e[c] = CT(ld(s[m*N+c])); } } return;
    FIXED_LENGTHS(n)
    #undef ROWS_OF
    for (i64 m = 0; m < mats; m++) for (i64 r = 0; r < rows; r++, e += n) for (i64 c = 0; c < n; c++) e[c] = CT(ld(s[m*n+c]));
}

// The values of columns as a block needs them: a single row of the compute type is used as it is, everything else is copied to `e`.
template<class S> static inline const CT* columns(CT* e, const S* s, i64 mats, i64 rows, i64 n) {
    fill_columns(e, s, mats, rows, n);
    return e;
}
static inline const CT* columns(CT* e, const CT* s, i64 mats, i64 rows, i64 n) {
    if (mats*rows == 1) return s;
    fill_columns(e, s, mats, rows, n);
    return e;
}

// The two kinds of reduction. A maximum is NaN if an element is.
struct Sum {
    static constexpr double start = 0;
    template<class F> static inline void add(F& q, F y) { q += y; }
};
struct Max {
    static constexpr double start = -INFINITY;
    template<class F> static inline void add(F& q, F y) { q = (y > q || y != y) ? y : q; }
};

// Reduce one long row.
template<class Op> struct Row {
    static inline CT of(const CT* y, i64 n) { CT q = CT(Op::start); for (i64 c = 0; c < n; c++) Op::add(q, y[c]); return q; }
};
template<> struct Row<Sum> {
    static inline CT of(const CT* y, i64 n) {
        CT q = 0;
        SIMD_SUM(q)
        for (i64 c = 0; c < n; c++) q += y[c];
        return q;
    }
};

// Reduce each row of a block to one value, and add it to `d`.
template<class Op> static inline void reduce_rows(double* __restrict__ d, const CT* __restrict__ y, i64 rows, i64 n) {
    #define ROWS_OF(N) for (i64 r = 0; r < rows; r++) { \
        CT q = y[r*N]; for (int c = 1; c < N; c++) Op::add(q, y[r*N+c]); Op::add(d[r], double(q)); } return;
    FIXED_LENGTHS(n)
    #undef ROWS_OF
    if (n < 16) {
        for (i64 r = 0; r < rows; r++) { CT q = y[r*n]; for (i64 c = 1; c < n; c++) Op::add(q, y[r*n+c]); Op::add(d[r], double(q)); }
        return;
    }
    for (i64 r = 0; r < rows; r++) Op::add(d[r], double(Row<Op>::of(y + r*n, n)));
}

// Reduce each column of each matrix of a block to one value, and add it to `d`.
template<class Op> static inline void reduce_columns(double* __restrict__ d, const CT* __restrict__ y, i64 mats, i64 rows, i64 n) {
    if (n == 3 && rows == 3) { // the matrices of most convolutions
        for (i64 m = 0; m < mats; m++, y += 9)
            for (int c = 0; c < 3; c++) { CT q = y[c]; for (i64 r = 1; r < 3; r++) Op::add(q, y[r*3+c]); Op::add(d[m*3+c], double(q)); }
        return;
    }
    CT q[BLK];
    for (i64 m = 0; m < mats; m++, y += rows*n) {
        if (rows == 1) { for (i64 c = 0; c < n; c++) Op::add(d[m*n+c], double(y[c])); continue; }
        for (i64 c = 0; c < n; c++) q[c] = y[c];
        for (i64 r = 1; r < rows; r++) for (i64 c = 0; c < n; c++) Op::add(q[c], y[r*n+c]);
        for (i64 c = 0; c < n; c++) Op::add(d[m*n+c], double(q[c]));
    }
}

// Walks over the blocks of a chunk: a block is whole matrices, whole rows of one matrix, or a part of a row.
// It begins at element c of row r of matrix m, `at` elements into the chunk, and has nm x nr x nc elements.
struct Block {
    i64 mats, rows, n, m = 0, r = 0, c = 0, nm = 1, nr = 1, nc, at = 0;
    Block(i64 mats, i64 rows, i64 n): mats(rows*n > 0 ? mats : 0), rows(rows), n(n), nc(n) { size(); }
    bool more() const { return m < mats; }
    void size() {
        if (n > BLK) nc = n - c < BLK ? n - c : BLK;
        else if (rows*n > BLK) nr = rows - r < BLK/n ? rows - r : BLK/n;
        else if (rows*n > 0) { nr = rows; nm = mats - m < BLK/(rows*n) ? mats - m : BLK/(rows*n); }
    }
    void next() {
        at += nm*nr*nc;
        if (n > BLK && (c += nc) < n) {}
        else if (c = 0, rows*n > BLK && (r += nr) < rows) {}
        else { r = 0; m += nm; }
        size();
    }
};
