// A program that runs emulated kernels from a file, to be built with ThreadSanitizer together with
// a generated source, which includes it. It prints the barriers that it came across, as
// "file:line", and does without the one that it is told. The file consists of words of 8 bytes, for
// each launch:
//
//   - which kernel: 0 for the meta-step, 1 for the sum;
//   - blocks or clusters; blocks of a cluster; threads; bytes of shared memory of a block;
//   - bytes of a number; words of arguments;
//   - for each of these words: its value, and how many bytes of memory it points to; then that
//     memory, in whole words.
//
// Memory of an address that came before is the same memory.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "emulate.cpp"

namespace {

std::set<std::string> seen;  // by thread 0: a lock would hide races
std::string without;

using Word = std::int64_t;

bool read(std::FILE* file, Word* to, size_t count) {
  return std::fread(to, sizeof(Word), count, file) == count;
}

std::string name_of(const char* file, int line) {
  const char* const slash = std::strrchr(file, '/');
  return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
}

}  // namespace

bool fm::cuda::left_out(const char* file, int line) {
  const std::string name = name_of(file, line);
  if (thread() == 0) seen.insert(name);
  return name == without;
}

// Arguments: the file of launches, and the barrier to do without, if any.
int main(int count, char** argv) {
  if (count > 2) without = argv[2];
  std::FILE* file = std::fopen(argv[1], "rb");
  if (!file) return 2;
  std::map<Word, std::vector<Word>> memory;
  Word head[7];
  while (read(file, head, 7)) {
    std::vector<Word> words(head[6]);
    for (Word& word : words) {
      Word entry[2];
      if (!read(file, entry, 2)) return 2;
      word = entry[0];
      if (entry[1] == 0) continue;
      std::vector<Word> content((entry[1] + 7) / 8);
      if (!read(file, content.data(), content.size())) return 2;
      auto& kept = memory.try_emplace(entry[0], content).first->second;
      word = reinterpret_cast<Word>(kept.data());
    }
    const auto kernel = head[0] == 0 ? reinterpret_cast<void (*)(const void*)>(fastmeta_meta_step)
                                     : reinterpret_cast<void (*)(const void*)>(fastmeta_sum);
    fastmeta_emulate(kernel, fastmeta_enter, words.data(), int(head[1]), int(head[2]), int(head[3]), head[4],
                     int(head[5]));
  }
  for (const std::string& name : seen) std::puts(name.c_str());
}
