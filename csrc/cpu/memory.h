// Scratch memory and large results that are kept for the next call: the pages of fresh memory cost more than the work on
// them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor.h"

namespace fasthyper {

// Of at least this size, aligned to a cache line; sets it to what is there. give() takes it back.
char* take_memory(size_t* bytes);
void give_memory(char* data, size_t bytes);

// Memory that grows; its content is lost when it does
class Memory {
 public:
  Memory() = default;
  Memory(Memory&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr, other.size_ = 0; }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Memory() { give_memory(data_, size_); }

  template <typename T>
  T* get(int64_t count) {
    const size_t bytes = count * sizeof(T);
    if (bytes > size_ || !data_) {
      give_memory(data_, size_);
      size_ = bytes;
      data_ = take_memory(&size_);
    }
    return reinterpret_cast<T*>(data_);
  }

  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

// A dense CPU tensor in such memory, of the type of ``like``
Tensor kept_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size);

}  // namespace fasthyper
