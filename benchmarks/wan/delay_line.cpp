// A delay line between pairs of TAP devices: what is read from one comes out of the other a fixed time later.
//
// Stands in for netem on kernels that lack it, so that every byte of every method is delayed alike, whatever library
// sent it. Bandwidth is the business of tc tbf on both devices. Linux only; started by wan_bed.py and by nobody else.
//
// usage: delay_line MICROSECONDS FD FD [FD FD ...]    each pair of open, non-blocking TAP descriptors is one cable

#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include <deque>
#include <utility>
#include <vector>

namespace {

constexpr size_t kMaxPacket = 1 << 17;
// Of one direction; a packet that finds it full is dropped, as in any router. 256 MiB hold 2 s at 1 Gbit/s.
constexpr size_t kMaxQueued = size_t(1) << 28;
// Reads of one device before the others get their turn.
constexpr int kBatch = 64;

struct Packet {
  int64_t due;
  std::vector<char> bytes;
};

struct Direction {
  int from, to;
  std::deque<Packet> queue;
  size_t queued = 0;
};

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

// Whether a read or write may be tried again later; anything else (a device that is gone) ends the program.
bool later(const char* what) {
  if (errno == EAGAIN || errno == EINTR) return true;
  perror(what);
  exit(1);
}

void take(Direction& d, int64_t delay, std::vector<char>& buffer) {
  for (int i = 0; i < kBatch; ++i) {
    const ssize_t size = read(d.from, buffer.data(), buffer.size());
    if (size < 0) {
      later("read");
      return;
    }
    if (d.queued + size_t(size) > kMaxQueued) continue;
    d.queue.push_back({now_ns() + delay, std::vector<char>(buffer.begin(), buffer.begin() + size)});
    d.queued += size_t(size);
  }
}

void give(Direction& d) {
  while (!d.queue.empty() && d.queue.front().due <= now_ns()) {
    const Packet& packet = d.queue.front();
    // EIO: the device is down, as before the bed is complete; the packet is lost, as on a real cable.
    if (write(d.to, packet.bytes.data(), packet.bytes.size()) < 0 && errno != EIO && later("write")) return;
    d.queued -= packet.bytes.size();
    d.queue.pop_front();
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4 || argc % 2 != 0) {
    fprintf(stderr, "usage: delay_line MICROSECONDS FD FD [FD FD ...]\n");
    return 2;
  }
  const int64_t delay = atoll(argv[1]) * 1000;
  prctl(PR_SET_TIMERSLACK, 1000UL);
  std::vector<Direction> directions;
  for (int i = 2; i < argc; i += 2) {
    const int a = atoi(argv[i]), b = atoi(argv[i + 1]);
    directions.push_back({a, b, {}});
    directions.push_back({b, a, {}});
  }
  std::vector<pollfd> polled;
  for (const Direction& d : directions) polled.push_back({d.from, POLLIN, 0});
  std::vector<char> buffer(kMaxPacket);
  for (;;) {
    int64_t next = INT64_MAX;
    for (Direction& d : directions) {
      give(d);
      if (!d.queue.empty() && d.queue.front().due < next) next = d.queue.front().due;
    }
    const int64_t left = next == INT64_MAX ? 1000000000 : next - now_ns();
    const timespec wait = {left > 0 ? left / 1000000000 : 0, left > 0 ? left % 1000000000 : 0};
    if (ppoll(polled.data(), polled.size(), &wait, nullptr) < 0 && errno != EINTR) {
      perror("ppoll");
      return 1;
    }
    for (size_t i = 0; i < directions.size(); ++i)
      if (polled[i].revents & POLLIN) take(directions[i], delay, buffer);
  }
}
