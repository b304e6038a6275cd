// What a compiled kernel tells the runtime about itself. export.h makes one for each entry.
#pragma once

#include <cstddef>

struct CupyflashKernel {
  void (*run)(void** arguments);  // called by every thread of every block
  int num_arguments;
  const std::size_t* argument_bytes;
};
