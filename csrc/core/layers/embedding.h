// An embedding of one feature: the feature, a category 0, 1, ..., is replaced by its row of a table [categories, width].
// The features beside it pass through:
//   z = [x before, W[c], x behind]
// The map is linear in W and in the other features, so that tangents are the same sums; there is no gradient to c itself.
// What is no category gives NaN (runtime/check.cpp refuses it before). Embeddings come first in a network.
#pragma once

#include <cmath>

#include "layer.h"

namespace pymeta {

struct EmbeddingSpec {
  static constexpr const char* kName = "embedding";
  static constexpr const char* kArguments = "ncnn";  // features, which of them, categories, width
  static constexpr bool kMixesRows = false;

  template <class Builder>
  static void add(Builder& builder, const double* arguments) {
    const int in = static_cast<int>(arguments[0]), feature = static_cast<int>(arguments[1]);
    const int categories = static_cast<int>(arguments[2]), width = static_cast<int>(arguments[3]);
    builder.append_embedding(in, feature, categories, width);
  }
};

}  // namespace pymeta

#ifdef PYMETA_MACHINE

PYMETA_KERNEL_BEGIN

template <class X>
struct Embedding {
  static constexpr bool kTransposesWeight = false;
  static constexpr bool kReadsRowsInPlace = false;

  PYMETA_FN static PackedTensor packed_weight(const Layer& layer) {
    const int width = embedded(layer);
    return {0, layer.lookup.categories, width, static_cast<int>(X::stride(width)), false};
  }
  PYMETA_FN static std::size_t kept_scalars(const Layer&, int, int) { return 0; }

  PYMETA_FN static void forward(const LayerPass& p, const Destination& to) {
    looked_up(p, p.x, p.weight, to);
  }
  PYMETA_FN static void backward(const LayerPass& p, const Destination& below) {
    passed_back(p, p.d, below);
  }
  PYMETA_FN static void gradient(const LayerPass& p, const Sink& weight, const Sink&) {
    scattered(p, p.d, weight);
  }
  PYMETA_FN static void tangent_forward(const LayerPass& p, const LayerTangent& t,
                                        const Destination& to) {
    looked_up(p, t.rx, t.weight, to);
  }
  PYMETA_FN static void tangent_backward(const LayerPass& p, const LayerTangent& t,
                                         const Destination& below) {
    passed_back(p, t.rd, below);
  }
  PYMETA_FN static void tangent_gradient(const LayerPass& p, const LayerTangent& t,
                                         const Sink& weight, const Sink&) {
    scattered(p, t.rd, weight);
  }

  static double work(const Layer& layer, const Effort& effort) {
    return elementwise_work<X>(layer, effort) +
           static_cast<double>(effort.support_rows + effort.query_rows) * layer.lookup.categories *
               X::vectors(embedded(layer));
  }

 private:
  PYMETA_FN static int embedded(const Layer& layer) {
    return layer.out.channels - layer.in.channels + 1;
  }
  // The row of the table that a lane's category names; -1 where it names none.
  PYMETA_FN static int category(const Layer& layer, Real value) {
    if (!(value >= 0 && value < Real(layer.lookup.categories))) return -1;
    const int index = static_cast<int>(value);
    return Real(index) == value ? index : -1;
  }

  // A vector made of its numbers: value(feature, lane of a task) of each.
  template <class Value>
  PYMETA_FN static Vec made(int vector, int features, Value value) {
    alignas(64) Real numbers[kWidth] = {};
    for (int i = 0; i < kWidth; ++i) {
      const int feature = X::kTasks == 1 ? vector * kWidth + i : vector;
      if (feature < features) numbers[i] = value(feature, X::kTasks == 1 ? 0 : i);
    }
    return load(numbers);
  }

  // `other` are the features beside the category, null for zeros; `table` likewise.
  PYMETA_FN PYMETA_NOINLINE static void looked_up(const LayerPass& p, const Matrix& other,
                                                  const Real* table, const Destination& to) {
    const Layer& layer = p.layer;
    const int features = layer.out.channels, first = layer.lookup.feature, width = embedded(layer);
    const long table_row = X::stride(width);
    X::with_epilogue(to, X::stride(features), p.extent, [&](const auto& emit) {
      X::map(p.extent, features, [&](long, long column, int r) {
        const int vector = static_cast<int>(column / kWidth);
        const Vec value = made(vector, features, [&](int f, int lane) {
          if (f < first || f >= first + width) {
            const int from = f < first ? f : f - width + 1;
            return other.p ? other.p[r * other.row + static_cast<long>(from) * X::kElement + lane]
                           : Real(0);
          }
          const int c =
              category(layer, p.x.p[r * p.x.row + static_cast<long>(first) * X::kElement + lane]);
          if (c < 0) return Real(NAN);
          return table ? table[c * table_row + static_cast<long>(f - first) * X::kElement + lane]
                       : Real(0);
        });
        emit(value, r, vector);
      });
    });
  }

  // To the features beside the category.
  PYMETA_FN PYMETA_NOINLINE static void passed_back(const LayerPass& p, const Real* d,
                                                    const Destination& below) {
    const Layer& layer = p.layer;
    const int features = layer.in.channels, first = layer.lookup.feature, width = embedded(layer);
    const long row = X::stride(layer.out.channels);
    X::with_epilogue(below, X::stride(features), p.extent, [&](const auto& emit) {
      X::map(p.extent, features, [&](long, long column, int r) {
        const int vector = static_cast<int>(column / kWidth);
        const Vec value = made(vector, features, [&](int f, int lane) {
          const int from = f < first ? f : f + width - 1;
          return f == first ? Real(0) : d[r * row + static_cast<long>(from) * X::kElement + lane];
        });
        emit(value, r, vector);
      });
    });
  }

  // gW[c] = the sum of d over the rows of category c, in their order
  PYMETA_FN PYMETA_NOINLINE static void scattered(const LayerPass& p, const Real* d,
                                                  const Sink& sink) {
    const Layer& layer = p.layer;
    const int first = layer.lookup.feature, width = embedded(layer);
    const long row = X::stride(layer.out.channels), table_row = X::stride(width);
    const Real* codes = p.x.p + static_cast<long>(first) * X::kElement;
    for (int c = 0; c < layer.lookup.categories; ++c) {
      X::sum_rows(p.extent, width, sink.from(c * table_row), [&](long at, long column) {
        const long r = (at - column) / table_row;
        const Real* code = codes + r * p.x.row;
        if (X::kTasks == 1 && !(*code == Real(c))) return zero();
        const Vec value = X::gathered(static_cast<int>(column / kWidth), width, [=](int feature) {
          return d + r * row + static_cast<long>(first + feature) * X::kElement;
        });
        return X::kTasks == 1 ? value
                              : select(X::element(code) == broadcast(Real(c)), value, zero());
      });
    }
  }
};

PYMETA_KERNEL_END

#endif  // PYMETA_MACHINE
