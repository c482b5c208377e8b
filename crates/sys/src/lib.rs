//! System calls that no safe library has, each behind a function that can't be misused.
//!
//! Nothing here has a policy or a state: callers say what is to be done, and get the host's error if it can't be.

pub mod tap;
