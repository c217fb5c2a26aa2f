//! Look-ups against a linear search, borders, and copies.
