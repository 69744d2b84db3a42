#include "engine.h"

#include <algorithm>
#include <new>
#include <stdexcept>

#include "check.h"
#include "pages.h"
#include "registry.h"

namespace pymeta {
namespace {

// Epochs of a task of so many rows find Adam's corrections packed beside the start; longer ones pack their own.
constexpr int kUsualRows = 1024;
constexpr std::int64_t kUsualSteps = 1 << 16;

// An Engine's call is the calling thread's alone.
void run_here(const Team&, std::int64_t count, void (*body)(void*, std::int64_t, int),
              void* context) {
  for (std::int64_t i = 0; i < count; ++i) body(context, i, 0);
}

}  // namespace

template <class Real>
Engine<Real>::Engine(const Call<Real>& recipe)
    : network_(*recipe.network),
      loss_(*recipe.loss),
      call_(recipe),
      executor_(&kernels<Real>().executors[0]) {
  const std::size_t out = static_cast<std::size_t>(recipe.network->out_features());
  if (loss_.weight) weight_.assign(loss_.weight, loss_.weight + out);
  if (loss_.pos_weight) pos_weight_.assign(loss_.pos_weight, loss_.pos_weight + out);
  loss_.weight = weight_.empty() ? nullptr : weight_.data();
  loss_.pos_weight = pos_weight_.empty() ? nullptr : pos_weight_.data();
  if (loss_.levels) levels_.assign(loss_.levels, loss_.levels + loss_.level_count);
  loss_.levels = levels_.empty() ? nullptr : levels_.data();
  loss_of_distributions_ = of_distributions(loss_);
  for (int t = 0; t < recipe.network->tensor_count; ++t) {
    const Tensor& tensor = network_.tensors[t];
    const std::size_t size = static_cast<std::size_t>(tensor.rows) * tensor.columns;
    tensors_.emplace_back(recipe.parameters[t], recipe.parameters[t] + size);
    parameters_.push_back(tensors_.back().data());
  }
  rates_.assign(recipe.lr.values,
                recipe.lr.values + static_cast<std::size_t>(recipe.lr.rows) * recipe.lr.columns);
  if (!recipe.lr.per_element)
    groups_.assign(recipe.lr.groups, recipe.lr.groups + recipe.network->tensor_count);
  std::copy(recipe.adapted, recipe.adapted + recipe.network->tensor_count, adapted_);

  call_.network = &network_.network;
  call_.loss = &loss_;
  call_.adapted = adapted_;
  call_.parameters = parameters_.data();
  call_.lr.values = rates_.data();
  call_.lr.groups = groups_.data();
  call_.tasks = 1;
  // Fixed steps on all rows are what a meta-learner's evaluation does; it factors a wide first layer.
  if (call_.job == Job::adapt && call_.batches.size == 0) call_.job = Job::meta;
  if (call_.steps > kMostSteps) throw std::invalid_argument("steps: more than 2^30");
  call_.max_support = kUsualRows;
  while (call_.max_support > 1 && call_.steps_of(call_.max_support) > kUsualSteps)
    call_.max_support /= 2;
  if (call_.steps_of(call_.max_support) > kUsualSteps) return;
  Block block(*this);
  start_.resize(block.plan(*this).start / sizeof(Real));
  executor_->pack(block.plan_at(), start_.data());
}

template <class Real>
Engine<Real>::~Engine() {
  for (auto& slot : idle_) delete slot.load();
}

template <class Real>
std::unique_ptr<typename Engine<Real>::Block> Engine<Real>::take() const {
  for (auto& slot : idle_)
    if (slot.load(std::memory_order_relaxed))
      if (Block* block = slot.exchange(nullptr, std::memory_order_acquire))
        return std::unique_ptr<Block>(block);
  return std::make_unique<Block>(*this);
}

// More blocks than slots are not kept.
template <class Real>
void Engine<Real>::give(std::unique_ptr<Block> block) const {
  for (auto& slot : idle_) {
    Block* empty = nullptr;
    if (slot.compare_exchange_strong(empty, block.get(), std::memory_order_release,
                                     std::memory_order_relaxed)) {
      block.release();
      return;
    }
  }
}

template <class Real>
Engine<Real>::Block::Block(const Engine& engine)
    : call(engine.call_), storage_(new char[engine.executor_->plan_bytes + 64]) {}

template <class Real>
const Needs& Engine<Real>::Block::plan(const Engine& engine) {
  planned_for_.reset();
  needs_ = *engine.executor_->plan(call, plan_at(), nullptr);
  planned_for_.emplace(call);
  return needs_;
}

template <class Real>
char* Engine<Real>::Block::memory_for(const Engine& engine) {
  if (planned_for_ && *planned_for_ == CallForm<Real>(call)) return memory_.get();
  const std::size_t planned = plan(engine).bytes(1);
  const std::size_t needed = planned ? planned : 64;  // no row is cleared, but it lies somewhere
  const std::size_t bytes = kKeepsPages ? (needed + 4095) / 4096 * 4096 : needed;
  if (kKeepsPages ? bytes > bytes_ : bytes != bytes_) {
    memory_ = {nullptr, {}};
    memory_ = {take_pages(bytes, 4096), {bytes}};
    bytes_ = memory_ ? bytes : 0;
    if (!memory_) {
      planned_for_.reset();
      throw std::bad_alloc();
    }
  }
  return memory_.get();
}

template <class Real>
void Engine<Real>::adapt_predict(const Real* xs, const void* ys, const Real* weights, int rows,
                                 const Real* xq, int query_rows, Real* out,
                                 const Beside& beside) const {
  struct Loan {  // given back whatever happens
    const Engine& engine;
    std::unique_ptr<Block> block;
    ~Loan() { engine.give(std::move(block)); }
  } loan{*this, take()};
  Block& block = *loan.block;
  Call<Real>& call = block.call;
  Real loss;
  call.support = {xs, ys, weights, rows, nullptr, nullptr, false, beside.weight_columns};
  call.support.offset = beside.offset;
  call.support.loss = beside.has_distributions ? &loss_of_distributions_ : &loss_;
  call.query = {xq, nullptr, nullptr, query_rows, nullptr, nullptr, false};
  call.query.offset = beside.query_offset;
  call.predictions = out;
  if (call.job == Job::meta) call.losses = &loss;
  check(call);
  char* const memory = block.memory_for(*this);
  const bool is_packed = block.needs().start <= start_.size() * sizeof(Real);
  call.packed_start = is_packed ? start_.data() : nullptr;
  executor_->run(block.plan_at(), Team{1, nullptr, run_here}, memory);
}

template class Engine<float>;
template class Engine<double>;

}  // namespace pymeta
