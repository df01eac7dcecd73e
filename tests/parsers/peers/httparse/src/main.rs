//! httparse, called as the C parsers are: NAME FILE REPETITIONS prints the nanoseconds of user time for one head.
use std::hint::black_box;

#[repr(C)]
struct Rusage {
    user: [i64; 2],
    rest: [i64; 16],
}

extern "C" {
    fn getrusage(who: i32, usage: *mut Rusage) -> i32;
}

fn user_time() -> f64 {
    let mut usage = Rusage { user: [0; 2], rest: [0; 16] };
    unsafe { getrusage(0, &mut usage) };
    usage.user[0] as f64 * 1e9 + usage.user[1] as f64 * 1e3
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let head = std::fs::read(&args[2]).expect("FILE");
    let times: u64 = args[3].parse().expect("REPETITIONS");
    let began = user_time();
    for _ in 0..times {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut request = httparse::Request::new(&mut headers);
        let status = request.parse(black_box(&head)).expect("not a head");
        assert!(status.is_complete(), "not a whole head");
        black_box(&request);
    }
    println!("{:.1}", (user_time() - began) / times as f64);
}
