// What special.h wants to know of a call: in numbers, by which calls are told apart, and as the text of a source.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "list_operands.h"

PYMETA_KERNEL_BEGIN

class SpecialNumbers {
 public:
  // The frame's list is made.
  SpecialNumbers(const Call<Real>& call, const TaskFrame<true>& frame, int threads) {
    put(threads);
    for (const RowSet<Real>* set : {&call.support, &call.query})
      put(static_cast<int>(call.loss_of(*set).kind));
    put(int{call.support.has_weightless || call.query.has_weightless});
    put(rows_of(call.support, call.batches.size > 0));
    put(rows_of(call.query, false));
    for (const int end : frame.list.ends) put(end);
    for (int i = 0; i < frame.list.count; ++i) put(frame.list.operations[i]);
  }

  std::string key() const {
    std::string key(numbers_.size() * sizeof(numbers_[0]), ' ');
    std::memcpy(key.data(), numbers_.data(), key.size());
    return key;
  }

  // In front of special_kernel_source.
  std::string constants() const {
    std::string text =
        "#define PYMETA_BLOCK\n#define PYMETA_SPECIAL\n"
        "#define PYMETA_ISA special\n#define PYMETA_FAMILY " PYMETA_SPELLED(
            PYMETA_FAMILY) "\n#define PYMETA_REAL " PYMETA_SPELLED(PYMETA_REAL) "\n";
    std::size_t at = 0;
    const auto define = [&](const char* name, int count) {
      text += std::string("#define PYMETA_SPECIAL_") + name;
      for (int i = 0; i < count; ++i)
        text += (i ? ", " : " ") + std::to_string(static_cast<int>(numbers_[at++]));
      text += "\n";
    };
    define("THREADS", 1);
    define("LOSSES", 2);
    define("LEAVES_OUT", 1);
    define("ROWS", 2);
    define("ENDS", kParts);
    text += "#define PYMETA_SPECIAL_OPERATIONS";
    while (at < numbers_.size()) {
      text += " {static_cast<Act>(" + std::to_string(numbers_[at]) + ")";
      for (std::size_t i = 1; i < kScalars; ++i) {
        const std::string number = std::to_string(numbers_[at + i]);
        text += i == kSet ? ", static_cast<SetOf>(" + number + ")" : ", " + number;
      }
      text += ", {";
      for (int i = 0; i < kSpots; ++i) text += std::to_string(numbers_[at + kScalars + i]) + "u, ";
      text += "}},";
      at += kScalars + kSpots;
    }
    return text + "\n";
  }

 private:
  void put(int number) { numbers_.push_back(static_cast<std::uint32_t>(number)); }
  // As its members follow on each other.
  void put(const Operation& op) {
    put(static_cast<int>(op.act));
    for (const int number : {int{op.count}, int{op.number}, int{op.height}}) put(number);
    put(static_cast<int>(op.set));
    for (const bool on : {op.relu, op.waits, op.from_last, op.has_before}) put(int{on});
    for (const int number : {int{op.in}, int{op.out}, int{op.rate}, int{op.share}}) put(number);
    numbers_.insert(numbers_.end(), op.spots, op.spots + kSpots);
  }
  // Those of every task and step; -1 where they differ.
  static int rows_of(const RowSet<Real>& set, bool in_batches) {
    return set.sizes || set.has_weightless || in_batches ? -1 : static_cast<int>(set.rows);
  }

  static constexpr std::size_t kSet = 4, kScalars = 13;  // of an operation

  std::vector<std::uint32_t> numbers_;
};

PYMETA_KERNEL_END
