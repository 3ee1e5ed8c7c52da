// The memory limit of a benchmark: read and write what an optimizer's step reads and writes, and compute next to nothing.
#include <cstdint>
// A row of the table: gradient, parameter, W states that are written, R that are only read. The compiler knows both numbers.
template<int W, int R> struct Row {
    const float *g, *r[R+1]; float *x, *w[W+1];
    Row(float* const* t, int64_t a, int w0, int nw, int r0) {
        g = t[0]+a; x = t[1]+a;
        for (int j=0; j<W; j++) w[j] = t[2+w0+j]+a;
        for (int j=0; j<R; j++) r[j] = t[2+nw+r0+j]+a;
    }
};
template<int W, int R, bool P> static void walk(float* const* t, int64_t a, int64_t n, float k, int w0, int nw, int r0) {
    const Row<W,R> o(t, a, w0, nw, r0);
    #pragma GCC ivdep
    for (int64_t i=0; i<n; i++) {
        float s = o.g[i];
        for (int j=0; j<R; j++) s += o.r[j][i];
        s *= k;
        if (P) o.x[i] += s;
        for (int j=0; j<W; j++) o.w[j][i] += s;
    }
}
// A reduction: the first pass writes the states and reads the parameter, the second writes the parameter and reads the states.
template<int W, int R, bool P> static float first(float* const* t, int64_t a, int64_t n, float k, int w0, int nw, int r0) {
    const Row<W,R> o(t, a, w0, nw, r0);
    float sum[16] = {};
    auto one = [&](int64_t i, int l) {
        float s = o.g[i];
        for (int j=0; j<R; j++) s += o.r[j][i];
        s *= k;
        if (P) s += k*o.x[i];
        for (int j=0; j<W; j++) o.w[j][i] += s;
        sum[l] += s;
    };
    int64_t i = 0;
    for (; i+16<=n; i+=16) {
        #pragma GCC ivdep
        for (int l=0; l<16; l++) one(i+l, l);
    }
    for (; i<n; i++) one(i, 0);
    float all = 0;
    for (int l=0; l<16; l++) all += sum[l];
    return all;
}
template<int W, int R, bool P> static void second(float* const* t, int64_t a, int64_t n, float k, int w0, int nw, int r0) {
    const Row<W,R> o(t, a, w0, nw, r0);
    #pragma GCC ivdep
    for (int64_t i=0; i<n; i++) {
        float s = 0;
        for (int j=0; j<R; j++) s += o.r[j][i];
        for (int j=0; j<W; j++) s += o.w[j][i];
        o.x[i] += s*k;
    }
}
#define ROWS(F) F(0,0) F(1,0) F(2,0) F(3,0) F(4,0) F(0,1) F(1,1) F(2,1) F(3,1) F(4,1)
template<bool P> static float go(int pass, float* const* t, int64_t a, int64_t n, float k, int w0, int w, int nw, int r0, int r) {
    #define CASE(W,R) if (w==W && r==R) { \
        if (pass==0) walk<W,R,P>(t, a, n, k, w0, nw, r0); \
        else if (pass==1) return first<W,R,P>(t, a, n, k, w0, nw, r0); \
        else second<W,R,P>(t, a, n, k, w0, nw, r0); \
        return 0; }
    ROWS(CASE)
    return 0;
}
// More than four written states or one that is only read take several passes over the chunk, which is in the cache by then.
static float all(int pass, float* const* t, int64_t a, int64_t n, float k, int nw, int nr) {
    float s = 0;
    int w0 = 0, r0 = 0;
    do {
        const int w = nw-w0<4 ? nw-w0 : 4, r = nr-r0<1 ? nr-r0 : 1;
        // where nothing is written, `first` looks at what is read
        s += w0+r0==0 ? go<true>(pass, t, a, n, k, w0, w, nw, r0, r) : go<false>(pass==0 && w==0 ? 1 : pass, t, a, n, k, w0, w, nw, r0, r);
        w0 += w; r0 += r;
    } while (w0<nw || r0<nr);
    return s;
}
// kinds: for each tensor the number of written states, of states that are only read, and whether there is a second pass.
extern "C" void memory_limit(float* const* tab, int64_t width, const int64_t* kinds, const int64_t* chunks, int64_t n, float* sink,
                             float k, int twice, int threads) {
    for (int p=0; p<1+twice; p++) {
        #pragma omp parallel for num_threads(threads) schedule(dynamic,8)
        for (int64_t c=0; c<n; c++) {
            const int64_t *q = chunks+3*c, *d = kinds+3*q[0];
            if (p && !d[2]) continue;
            sink[c] += all(d[2] ? 1+p : 0, tab+q[0]*width, q[1], q[2], k, d[0], d[1]);
        }
    }
}
