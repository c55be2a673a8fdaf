"""Engine of live streams: takes audio, and yields events. It does not depend on a protocol."""
