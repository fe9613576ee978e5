//! The netns harness, the lab and the scenarios.
