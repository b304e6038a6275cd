// Words for reports.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "site.h"

namespace emulator {

// "fwd_sm80.cu" of "kernels_cu/fwd_sm80.cu".
inline const char* base_name(const char* file) {
  if (file == nullptr) return "?";
  const char* slash = std::strrchr(file, '/');
  return slash == nullptr ? file : slash + 1;
}

inline std::string text_of(Site site) { return std::string(base_name(site.file)) + ":" + std::to_string(site.line); }

// "0-15,17" of the bits 0x0002ffff; "none" of 0.
inline std::string lanes_text(std::uint32_t lanes) {
  std::string text;
  for (int first = 0; first < 32; ++first) {
    if ((lanes >> first & 1) == 0) continue;
    int last = first;
    while (last < 31 && (lanes >> (last + 1) & 1) != 0) ++last;
    text += (text.empty() ? "" : ",") + std::to_string(first) + (last > first ? "-" + std::to_string(last) : "");
    first = last;
  }
  return text.empty() ? "none" : text;
}

}  // namespace emulator
