//! `vhost-ctl status`.
use std::io::Write;
use std::time::Duration;

use serde_json::json;
use vhost_device::control::protocol::Request;
use vhost_device::control::report::{GuestStatus, Process, Status};

use crate::Failure;
use crate::daemons::{Daemons, shown};
use crate::table::{bytes, span};

pub(crate) fn show(daemons: &mut Daemons, as_json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    let guest = daemons.guest();
    let mut all = Vec::new();
    for client in &mut daemons.clients {
        let status: Status = client.ask(&Request::Status { guest })?;
        all.push((client.path.display().to_string(), status));
    }
    if as_json {
        let all: Vec<_> =
            all.iter().map(|(socket, status)| json!({"socket": socket, "status": status})).collect();
        writeln!(out, "{}", json!(all))?;
        return Ok(());
    }
    for (socket, status) in &all {
        writeln!(
            out,
            "{socket}: {} {}, {}",
            status.version.name,
            status.version.version,
            process(&status.process)
        )?;
        for guest in &status.guests {
            describe(guest, out)?;
        }
    }
    Ok(())
}

fn process(process: &Process) -> String {
    let resident = process.resident_bytes.map(|resident| format!(", {}B", bytes(resident as f64)));
    format!(
        "pid {}, up {}{}, log level {}",
        process.pid,
        span(Duration::from_millis(process.uptime_ms)),
        resident.unwrap_or_default(),
        format!("{:?}", process.log_level).to_lowercase()
    )
}

fn describe(guest: &GuestStatus, out: &mut dyn Write) -> Result<(), Failure> {
    let socket = guest.socket.as_ref().map(|socket| format!(" at {socket}")).unwrap_or_default();
    writeln!(out, "  guest {}: {}{socket}, {}", guest.guest, guest.device, state(guest))?;
    let or_none = |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(" ") };
    writeln!(out, "    status      {}", or_none(&guest.status))?;
    if let Some(why) = &guest.last_failure {
        writeln!(out, "    last failure {}", shown(&json!(why)))?;
    }
    writeln!(out, "    offered     {}", or_none(&guest.offered))?;
    writeln!(out, "    negotiated  {}", or_none(&guest.negotiated))?;
    Ok(())
}

fn state(guest: &GuestStatus) -> &'static str {
    match (guest.connected, guest.needs_reset) {
        (_, true) => "needs a reset",
        (true, false) => "connected",
        (false, false) => "no front-end",
    }
}
