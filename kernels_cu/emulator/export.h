// Makes an entry of a kernel file callable from outside.
//
// The translation unit of a compiled kernel is: this file, the flattened kernel source, and one
// CUPYFLASH_EXPORT for each entry. Python finds cupyflash_kernel_<entry> with dlsym and hands it to
// cupyflash_emulator_launch.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include "kernel.h"

namespace emulator {

template <auto kEntry>
struct Exported;

template <class... Parameters, void (*kEntry)(Parameters...)>
struct Exported<kEntry> {
  static void run(void** arguments) { call(arguments, std::index_sequence_for<Parameters...>{}); }

  static constexpr int kNumArguments = sizeof...(Parameters);
  static constexpr std::size_t kArgumentBytes[] = {sizeof(Parameters)..., 0};

 private:
  template <std::size_t... kIndex>
  static void call([[maybe_unused]] void** arguments, std::index_sequence<kIndex...>) {
    kEntry(*static_cast<std::remove_cv_t<std::remove_reference_t<Parameters>>*>(arguments[kIndex])...);
  }
};

}  // namespace emulator

// Only this symbol is visible: an entry that happens to be called `write` must not meet the C library's.
#define CUPYFLASH_EXPORT(entry)                                                                     \
  extern "C" __attribute__((visibility("default"))) const CupyflashKernel cupyflash_kernel_##entry; \
  const CupyflashKernel cupyflash_kernel_##entry = {&emulator::Exported<&entry>::run,               \
                                                    emulator::Exported<&entry>::kNumArguments,      \
                                                    emulator::Exported<&entry>::kArgumentBytes}
