extern "C" int probe() { return 1; }
