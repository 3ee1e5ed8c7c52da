// Vector versions of mathematical functions, from glibc (libmvec), so that a loop that calls them is vectorised.
// They are at most 4 ulp off. glibc declares them only under -ffast-math, so this file does.
// build.py defines VECTOR_MATH where it links libmvec.
#pragma once
#include <cmath>
#if defined(VECTOR_MATH) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__) && __GLIBC_PREREQ(2,35)
#define UNARY(name) \
    __attribute__((__simd__("notinbranch"))) float name##f(float) noexcept; \
    __attribute__((__simd__("notinbranch"))) double name(double) noexcept;
#define BINARY(name) \
    __attribute__((__simd__("notinbranch"))) float name##f(float, float) noexcept; \
    __attribute__((__simd__("notinbranch"))) double name(double, double) noexcept;
extern "C" {
UNARY(exp) UNARY(expm1) UNARY(log) UNARY(log1p) UNARY(log2) UNARY(tanh) UNARY(erf) UNARY(sin) UNARY(cos) UNARY(cbrt)
BINARY(pow)
}
#undef UNARY
#undef BINARY
#endif
