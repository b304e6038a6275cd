#include <cstring>

#include "block.h"

namespace emulator {

bool observing = false;

void observe(const char* event, const Bytes* parts, std::size_t num_parts) {
  const Thread& me = current_thread();
  Block& block = *me.block;
  ObservationHeader header = {};
  for (std::size_t i = 0; i < num_parts; ++i) header.num_bytes += static_cast<std::uint32_t>(parts[i].count);
  header.block = me.block_index.x;
  header.thread = static_cast<std::uint32_t>(me.thread_index);
  std::strncpy(header.event, event, sizeof header.event - 1);
  const auto append = [&block](const void* data, std::size_t count) {
    const auto* bytes = static_cast<const std::byte*>(data);
    block.observations.insert(block.observations.end(), bytes, bytes + count);
  };
  append(&header, sizeof header);
  for (std::size_t i = 0; i < num_parts; ++i) append(parts[i].data, parts[i].count);
}

}  // namespace emulator
