// Refusals that begin with the op. Those of STD_TORCH_CHECK begin with the name of a function and the
// path of its file on the machine that built the library.

#pragma once

#include <sstream>
#include <stdexcept>

namespace stem_fast {

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace stem_fast

// Raises unless the condition holds: the message is the op, and what is due.
#define STEM_FAST_CHECK(condition, ...)                  \
  do {                                                   \
    if (!(condition)) ::stem_fast::refuse(__VA_ARGS__);  \
  } while (false)
