#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| backplane_fuzz::qcow2(data));
