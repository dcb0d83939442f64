// Rows between memory and files.
#include <fcntl.h>
#include <torch/csrc/stable/library.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "slot_tensors.h"

namespace torchrec_cafe {
namespace {

// Rows that a thread takes at a time.
constexpr int64_t kRowsPerTurn = 16;
// What memory has to be aligned to for O_DIRECT, whatever the disk.
constexpr size_t kPage = 4096;

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
using PageAligned = std::unique_ptr<char, Free>;

// Runs transfer(i, bounce) for i in [0, size) on threads of their own, which spend their time
// waiting for a disk: more than there are cores keep its queue full. `bounce` is aligned memory of
// `bounce_bytes`, a thread's own. Returns the first error number, or 0.
template <typename Transfer>
int each_on_threads(int64_t size, int64_t num_threads, size_t bounce_bytes,
                    const Transfer& transfer) {
  std::atomic<int64_t> next{0};
  std::atomic<int> error{0};
  const auto work = [&] {
    PageAligned bounce;
    if (bounce_bytes > 0) {
      const size_t bytes = (bounce_bytes + kPage - 1) / kPage * kPage;
      bounce.reset(static_cast<char*>(std::aligned_alloc(kPage, bytes)));
      if (!bounce) error.store(ENOMEM);
    }
    while (error.load(std::memory_order_relaxed) == 0) {
      const int64_t begin = next.fetch_add(kRowsPerTurn, std::memory_order_relaxed);
      if (begin >= size) return;
      for (int64_t i = begin; i < std::min(size, begin + kRowsPerTurn); ++i) {
        const int failed = transfer(i, bounce.get());
        if (failed != 0) error.store(failed, std::memory_order_relaxed);
      }
    }
  };
  const int64_t wanted = std::min(num_threads, (size + kRowsPerTurn - 1) / kRowsPerTurn);
  std::vector<std::thread> threads;
  try {
    for (int64_t t = 1; t < wanted; ++t) threads.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads are to be had: those that there are do the work.
  }
  work();
  for (std::thread& thread : threads) thread.join();
  return error.load();
}

// Calls a system call that moves part of [at, at + bytes) until all is moved.
template <typename Call>
int move_all(char* memory, int64_t bytes, int64_t at, const Call& call) {
  while (bytes > 0) {
    const ssize_t moved = call(memory, bytes, at);
    if (moved < 0 && errno == EINTR) continue;
    if (moved < 0) return errno;
    if (moved == 0) return EIO;  // the end of the file
    memory += moved;
    at += moved;
    bytes -= moved;
  }
  return 0;
}

// Rows that a file can have, so that their places in it fit into 64 bits.
int64_t file_rows(int64_t bytes) { return INT64_MAX / std::max<int64_t>(1, bytes); }

void check_file(int64_t file, int64_t num_threads) {
  STD_TORCH_CHECK(file >= 0 && file < INT32_MAX, "`file` must be a file descriptor, got ", file);
  STD_TORCH_CHECK(num_threads >= 1 && num_threads <= 1024,
                  "`num_threads` must be in [1, 1024], got ", num_threads);
}

// Memory of rows is not aligned as O_DIRECT asks for.
size_t bounce_bytes(int64_t file, int64_t bytes) {
  const int flags = fcntl(static_cast<int>(file), F_GETFL);
  return flags >= 0 && (flags & O_DIRECT) != 0 ? static_cast<size_t>(bytes) : 0;
}

void read_rows_cpu(int64_t file, const Tensor& rows, const Tensor& into, const Tensor& into_rows,
                   int64_t num_threads) {
  check_copies(into, into_rows, rows);
  check_apart(into, "into", into_rows, rows);
  check_file(file, num_threads);
  if (rows.numel() == 0) return;
  check_row_numbers(into_rows, "into_rows", into.size(0));
  const int64_t bytes = row_bytes(into);
  check_row_numbers(rows, "rows", file_rows(bytes));
  auto* to = static_cast<char*>(into.data_ptr());
  const int64_t* to_row = into_rows.const_data_ptr<int64_t>();
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const auto call = [file](char* memory, int64_t size, int64_t at) {
    return pread(static_cast<int>(file), memory, size, at);
  };
  const auto read = [&](int64_t i, char* bounce) {
    char* memory = to + to_row[i] * bytes;
    const int error = move_all(bounce ? bounce : memory, bytes, row[i] * bytes, call);
    if (error == 0 && bounce) std::memcpy(memory, bounce, bytes);
    return error;
  };
  const int error = each_on_threads(rows.numel(), num_threads, bounce_bytes(file, bytes), read);
  STD_TORCH_CHECK(error == 0, "`file` could not be read: ", std::strerror(error));
}

void write_rows_cpu(int64_t file, const Tensor& rows, const Tensor& from, const Tensor& from_rows,
                    int64_t num_threads) {
  check_copies(from, from_rows, rows);
  check_file(file, num_threads);
  if (rows.numel() == 0) return;
  check_row_numbers(from_rows, "source_rows", from.size(0));
  const int64_t bytes = row_bytes(from);
  check_row_numbers(rows, "rows", file_rows(bytes));
  auto* source = static_cast<char*>(from.data_ptr());
  const int64_t* from_row = from_rows.const_data_ptr<int64_t>();
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const auto call = [file](const char* memory, int64_t size, int64_t at) {
    return pwrite(static_cast<int>(file), memory, size, at);
  };
  const auto write = [&](int64_t i, char* bounce) {
    char* memory = source + from_row[i] * bytes;
    if (bounce) memory = static_cast<char*>(std::memcpy(bounce, memory, bytes));
    return move_all(memory, bytes, row[i] * bytes, call);
  };
  const int error = each_on_threads(rows.numel(), num_threads, bounce_bytes(file, bytes), write);
  STD_TORCH_CHECK(error == 0, "`file` could not be written: ", std::strerror(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) {
  m.impl("read_rows", TORCH_BOX(&read_rows_cpu));
  m.impl("write_rows", TORCH_BOX(&write_rows_cpu));
}

}  // namespace torchrec_cafe
