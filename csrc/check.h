// Arguments are checked in one line, and what is wrong is said in one. Not written to a stream: in a library that a compiler
// gave a libstdc++ of its own, a number in a stream was seen to end the process.
#pragma once

#include <stdexcept>
#include <string>

namespace fasthyper {

inline std::string to_text(const char* text) { return text; }

template <typename T>
std::string to_text(T number) {
  return std::to_string(number);
}

// Ends an op with a RuntimeError of these words and numbers
template <typename... Parts>
[[noreturn]] void fail(Parts... parts) {
  throw std::runtime_error((to_text(parts) + ...));
}

}  // namespace fasthyper

#define FASTHYPER_CHECK(condition, ...)               \
  do {                                                \
    if (!(condition)) ::fasthyper::fail(__VA_ARGS__); \
  } while (false)
