// Every generated kernel begins with this file: element types, loads and stores, rounding, and a parallel loop.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifndef _OPENMP
#include <atomic>
#include <thread>
#include <vector>
#endif

typedef int64_t i64;

#ifdef __clang__
#pragma clang diagnostic ignored "-Wpass-failed" // a loop below SIMD_SUM that clang can't vectorise is slower, and right
#endif
// IVDEP before a loop: its iterations are independent. Clang has no such pragma; it relies on __restrict__ alone.
// SIMD_SUM(q, ...) before a loop: it adds up these variables, and may do so in any order.
#if defined(__GNUC__) && !defined(__clang__)
#define IVDEP _Pragma("GCC ivdep")
#else
#define IVDEP
#endif
#ifdef _OPENMP
#define OMP_PRAGMA(text) _Pragma(#text)
#define SIMD_SUM(...) OMP_PRAGMA(omp simd reduction(+:__VA_ARGS__))
#else
#define SIMD_SUM(...)
#endif

// `ld` loads an element for arithmetic in float or double, `st` stores a result.
static inline float ld(float x) { return x; }
static inline double ld(double x) { return x; }
static inline void st(float& h, double f) { h = float(f); }
static inline void st(double& h, double f) { h = f; }

// bfloat16 is rounded to nearest, ties to even; every NaN becomes 0x7fc0.
struct bf16 { uint16_t bits; };
static inline float ld(bf16 h) { uint32_t u = uint32_t(h.bits) << 16; float f; std::memcpy(&f, &u, 4); return f; }
static inline void st(bf16& h, float f) {
    uint32_t u; std::memcpy(&u, &f, 4);
    uint32_t r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    h.bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : r);
}
static inline void st(bf16& h, double f) { st(h, float(f)); }
static inline float round_bf16(float x) { bf16 h; st(h, x); return ld(h); }

// float16 is the compiler's own type, or, where it has none (clang before version 15 on most processors), converted by its bits.
#if defined(__FLT16_MANT_DIG__) || defined(__ARM_FP16_FORMAT_IEEE)
typedef _Float16 f16;
static inline float ld(f16 h) { return float(h); }
static inline void st(f16& h, float f) { h = f16(f); }
#else
struct f16 { uint16_t bits; };
static inline float ld(f16 h) {
    uint32_t u = uint32_t(h.bits & 0x7fffu) << 13; float f;
    const uint32_t exponent = u & 0xf800000u;
    u += exponent == 0xf800000u ? 0x70000000u : 0x38000000u; // inf and NaN keep the largest exponent
    if (exponent) std::memcpy(&f, &u, 4);
    else { u += 0x800000u; std::memcpy(&f, &u, 4); f -= 6.103515625e-05f; } // subnormal
    return h.bits & 0x8000u ? -f : f;
}
static inline void st(f16& h, float f) {
    uint32_t u, r; std::memcpy(&u, &f, 4);
    const uint32_t a = u & 0x7fffffffu;
    if (a >= 0x47800000u) r = a > 0x7f800000u ? 0x7e00u : 0x7c00u; // NaN, or too large
    else if (a >= 0x38800000u) r = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
    else { float t = std::fabs(f) + 0.5f; std::memcpy(&r, &t, 4); r -= 0x3f000000u; } // subnormal: the sum is rounded to its last bit
    h.bits = uint16_t(((u >> 16) & 0x8000u) | r);
}
#endif
static inline void st(f16& h, double f) { st(h, float(f)); }
static inline float round_f16(float x) { f16 h; st(h, x); return ld(h); }

// Stochastic rounding to bfloat16; the same random bits as `sround_bfloat16` in engine.ops.
static inline float sround_bf16(float x, uint32_t place, double seed, double step, double salt) {
    const uint32_t key = (uint32_t(seed)*0x9E3779B1u + uint32_t(step))*0x85EBCA6Bu + uint32_t(salt);
    uint32_t h = (place*0x9E3779B1u) ^ key;
    h ^= h >> 16; h *= 0x85EBCA6Bu; h ^= h >> 13; h *= 0xC2B2AE35u; h ^= h >> 16;
    uint32_t u; std::memcpy(&u, &x, 4);
    const uint32_t r = (u & 0x7f800000u) == 0x7f800000u ? u : (u + (h & 0xffffu)) & 0xffff0000u;
    float f; std::memcpy(&f, &r, 4); return f;
}

// Call f(0), ..., f(n-1) on so many threads: OpenMP's, or std::thread where the compiler has no OpenMP.
template<class F> static void each(int threads, i64 n, F f) {
    if (threads <= 1 || n <= 1) { for (i64 i = 0; i < n; i++) f(i); return; }
    i64 grain = n / (threads * 256); if (grain < 1) grain = 1;
#ifdef _OPENMP
    #pragma omp parallel for num_threads(threads) schedule(dynamic, grain)
    for (i64 i = 0; i < n; i++) f(i);
#else
    std::atomic<i64> next(0);
    auto work = [&] { for (i64 a; (a = next.fetch_add(grain)) < n;) for (i64 i = a; i < n && i < a + grain; i++) f(i); };
    std::vector<std::thread> ts;
    for (int t = 1; t < threads; t++) ts.emplace_back(work);
    work();
    for (auto& t : ts) t.join();
#endif
}
