//! PCI from outside: a machine with both ways to configuration space, and a guest that uses them.
mod config;
mod hotplug;
mod interrupts;
mod machine;
mod map;
mod state;
mod topology;
