#include "memory.h"

#include <cstdlib>
#include <map>
#include <mutex>

namespace fasthyper {
namespace {

constexpr size_t kMostKept = size_t(1) << 28;

struct Kept {
  std::mutex mutex;
  std::multimap<size_t, char*> blocks;
  size_t total = 0;
};

// Never destroyed: tensors may outlive whatever is destroyed at exit
Kept& kept() {
  static Kept* const kept = new Kept;
  return *kept;
}

}  // namespace

char* take_memory(size_t* bytes) {
  *bytes = (*bytes + 63) / 64 * 64 + (*bytes == 0) * 64;
  {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    const auto found = kept().blocks.lower_bound(*bytes);
    if (found != kept().blocks.end() && found->first <= 2 * *bytes) {
      char* data = found->second;
      *bytes = found->first;
      kept().total -= found->first;
      kept().blocks.erase(found);
      return data;
    }
  }
  char* data = static_cast<char*>(std::aligned_alloc(64, *bytes));
  FASTHYPER_CHECK(data != nullptr, "out of memory: could not get ", *bytes, " bytes");
  return data;
}

void give_memory(char* data, size_t bytes) {
  if (!data) return;
  {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    if (kept().total + bytes <= kMostKept) {
      kept().blocks.emplace(bytes, data);
      kept().total += bytes;
      return;
    }
  }
  std::free(data);
}

Tensor kept_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size) {
  std::vector<int64_t> strides(size.size(), 1);
  size_t count = 1;
  for (size_t i = size.size(); i-- > 0;) strides[i] = count, count *= size[i];
  size_t bytes = count * (like.scalar_type() == ScalarType::Double ? 8 : 4);
  char* data = take_memory(&bytes);
  return torch::stable::from_blob(data, size, {strides.data(), strides.size()}, like.device(), like.scalar_type(),
                                  [bytes](void* p) { give_memory(static_cast<char*>(p), bytes); });
}

}  // namespace fasthyper
