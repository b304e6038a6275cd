// A place in a kernel's source, for reports.
#pragma once

namespace emulator {

struct Site {
  const char* file = nullptr;
  int line = 0;

  // As the default of a parameter, this is the place of the call: compilers evaluate both built-ins there.
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

}  // namespace emulator
