// A single call, known when its kernel is compiled (special_kernel.h): its list of operations is a constant, and each of them a type.
//
// All that a list says is a number in the code then: sizes, tiles, operands' places in shared memory; what an act does not need is not
// there. Operations that differ in their places alone, as those of inner steps do, share their code. special_source.h writes the
// constants:
//   PYMETA_SPECIAL             defined
//   PYMETA_SPECIAL_THREADS     of a block
//   PYMETA_SPECIAL_LOSSES      of the support and query sets
//   PYMETA_SPECIAL_LEAVES_OUT  may rows be left out?
//   PYMETA_SPECIAL_ROWS        of the support and query sets; -1 where tasks may have other numbers
//   PYMETA_SPECIAL_ENDS, PYMETA_SPECIAL_OPERATIONS    an OperationList's
#pragma once

#include "operations.h"

#ifdef PYMETA_SPECIAL

PYMETA_KERNEL_BEGIN

#ifdef __CUDACC__
#define PYMETA_CONSTANT __constant__
#else
#define PYMETA_CONSTANT
#endif
PYMETA_CONSTANT constexpr Operation kSpecialOperations[] = {PYMETA_SPECIAL_OPERATIONS};
constexpr int kSpecialCount = sizeof(kSpecialOperations) / sizeof(Operation);
constexpr int kSpecialEnds[kParts] = {PYMETA_SPECIAL_ENDS};
PYMETA_CONSTANT constexpr int kSpecialRows[2] = {PYMETA_SPECIAL_ROWS};

PYMETA_FN constexpr Spot memory_of(Spot spot) {
  return spot == kNoSpot ? kNoSpot : spot >> kSpotBits;
}

// Do they differ in nothing but where in the same memories their operands lie? Whether they wait is no part of their code.
PYMETA_FN constexpr bool are_alike(const Operation& a, const Operation& b) {
  for (int i = 0; i < kSpots; ++i)
    if (memory_of(a.spots[i]) != memory_of(b.spots[i])) return false;
  return a.act == b.act && a.count == b.count && a.number == b.number && a.height == b.height &&
         a.set == b.set && a.relu == b.relu && a.from_last == b.from_last &&
         a.has_before == b.has_before && a.in == b.in && a.out == b.out && a.rate == b.rate &&
         a.share == b.share;
}
PYMETA_FN constexpr int first_like(int i) {
  int first = 0;
  while (!are_alike(kSpecialOperations[first], kSpecialOperations[i])) ++first;
  return first;
}
PYMETA_FN constexpr bool is_repeated(int i) {
  int count = 0;
  for (int j = 0; j < kSpecialCount; ++j)
    count += are_alike(kSpecialOperations[j], kSpecialOperations[i]);
  return count > 1;
}

// What an Operation has, as constants.
template <int i>
struct Special {
  static constexpr Act act = kSpecialOperations[i].act;
  static constexpr int count = kSpecialOperations[i].count;
  static constexpr int number = kSpecialOperations[i].number;
  static constexpr int height = kSpecialOperations[i].height;
  static constexpr SetOf set = kSpecialOperations[i].set;
  static constexpr bool relu = kSpecialOperations[i].relu;
  static constexpr bool from_last = kSpecialOperations[i].from_last;
  static constexpr bool has_before = kSpecialOperations[i].has_before;
  static constexpr int in = kSpecialOperations[i].in, out = kSpecialOperations[i].out;
  static constexpr int rate = kSpecialOperations[i].rate;
  static constexpr int share = kSpecialOperations[i].share;

  PYMETA_FN constexpr Spot spot(int operand) const { return kSpecialOperations[i].spots[operand]; }
};
// One of those like the i-th: their memories are known, and their places there are looked up.
template <int i>
struct Repeated : Special<i> {
  const Spot* spots;

  PYMETA_FN explicit Repeated(const Spot* of) : spots(of) {}
  PYMETA_FN Spot spot(int operand) const {
    const Spot like = kSpecialOperations[i].spots[operand];
    return like == kNoSpot ? kNoSpot : (like & ~kWithin) | (spots[operand] & kWithin);
  }
};

PYMETA_KERNEL_END

#endif  // PYMETA_SPECIAL
