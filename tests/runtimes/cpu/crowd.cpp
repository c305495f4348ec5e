// The size of a team by itself, for test_crowd.py.
#include "crowd.h"

using namespace mapar;

extern "C" {
Crowd* crowd_new() { return new Crowd; }
void crowd_delete(Crowd* crowd) { delete crowd; }
int crowd_team_of(const Crowd* crowd, int threads) { return crowd->team_of(threads); }
void crowd_saw(Crowd* crowd, int team, int threads, int waiting, int milliseconds) {
    crowd->saw(team, threads, waiting, Crowd::Clock::time_point() + std::chrono::milliseconds(milliseconds));
}
int crowd_too_many(int team, int waiting, double ran, double took) { return Watch::too_many(team, waiting, ran, took); }
uint64_t waited() {
    static thread_local Waited here;
    return here.passed();
}
}
