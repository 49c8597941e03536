//! What every daemon needs besides the data path.
