// What the kernels use of the standard library, for NVRTC, which has none.
#pragma once

using size_t = decltype(sizeof(0));
// What EDG, the compiler in front of NVRTC, has for it.
#define offsetof(type, member) __INTADDR__(&((static_cast<type*>(nullptr))->member))
#define NAN __int_as_float(0x7fffffff)
#define INFINITY __int_as_float(0x7f800000)

namespace std {
using size_t = ::size_t;
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;

template <class T>
struct remove_const {
  using type = T;
};
template <class T>
struct remove_const<const T> {
  using type = T;
};
template <class T>
struct decay : remove_const<T> {};
template <class T>
struct decay<T&> : remove_const<T> {};
template <class T>
using decay_t = typename decay<T>::type;

template <bool, class Yes, class>
struct conditional {
  using type = Yes;
};
template <class Yes, class No>
struct conditional<false, Yes, No> {
  using type = No;
};
template <bool yes, class Yes, class No>
using conditional_t = typename conditional<yes, Yes, No>::type;

using ::lgamma;
using ::log;
}  // namespace std
