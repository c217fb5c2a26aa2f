//! Requests of the host to a device: what is listed, what is checked, what a panic does.
use reactor::Mail;
use std::sync::Arc;
use vm_virtio::controls::{
    Argument, Arguments, ControlCommand, ControlRequest, Controls, Kind, Property, Value,
};
use vm_virtio::{
    DeviceError, DeviceType, Engine, EngineOptions, Features, HostError, HostEvent, HostEvents, HostReply,
    HostRequest, Lane, QueueSpec, Status, VirtioDevice, Worker,
};

struct Deaf;

impl HostEvents for Deaf {
    fn event(&self, _: HostEvent) {}
}

struct Idle;

impl Worker for Idle {
    type Msg = ();
    fn queue_ready(&mut self, _: u16, _: &mut Lane<'_>) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// A lamp with a level, a serial number, a colour, and a switch that burns it out.
struct Lamp {
    level: u64,
    entered: u32,
}

impl VirtioDevice for Lamp {
    type Worker = Idle;
    fn device_type(&self) -> DeviceType {
        DeviceType(42)
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queues(&self, _: Features) -> Vec<QueueSpec> {
        vec![]
    }
    fn workers(&mut self, _: &[Mail<()>]) -> Result<Vec<Idle>, DeviceError> {
        Ok(vec![Idle])
    }
    fn controls(&self) -> Controls {
        let watts =
            Argument { name: "watts".into(), kind: Kind::ANY_U64, required: true, help: "how much".into() };
        let note = Argument {
            name: "note".into(),
            kind: Kind::Text { max: 8 },
            required: false,
            help: "why".into(),
        };
        Controls {
            properties: vec![
                Property::settable("level", Kind::U64 { min: 1, max: 9 }, "brightness"),
                Property::read_only("serial", Kind::Text { max: 8 }, "as printed on it"),
                Property::read_only("entered", Kind::ANY_U64, "requests so far"),
                Property::settable("colour", Kind::Choice(vec!["red".into(), "blue".into()]), "its colour"),
            ],
            commands: vec![ControlCommand {
                name: "overload".into(),
                arguments: vec![watts, note],
                help: "burns it out".into(),
            }],
        }
    }
    fn host_request(&mut self, request: HostRequest) -> Result<HostReply, HostError> {
        self.entered += 1;
        let HostRequest::Control(request) = request else { return Err(HostError::Unsupported) };
        match request {
            ControlRequest::Get(name) => Ok(HostReply::Value(match name.as_str() {
                "level" => Value::U64(self.level),
                "entered" => Value::U64(self.entered.into()),
                _ => Value::Text("L-1".into()),
            })),
            ControlRequest::Set(name, Value::U64(level)) if name == "level" => {
                self.level = level;
                Ok(HostReply::Done)
            }
            ControlRequest::Run(_, arguments) => panic!("{:?} is too much", arguments.u64("watts")),
            _ => Err(HostError::Refused("the lamp has one colour only".into())),
        }
    }
}

fn engine() -> Engine<Lamp> {
    Engine::new(Lamp { level: 5, entered: 0 }, EngineOptions::new(Arc::new(Deaf))).unwrap().0
}

fn ask(engine: &Engine<Lamp>, request: ControlRequest) -> Result<HostReply, HostError> {
    engine.host_request(HostRequest::Control(request))
}

fn set(name: &str, value: Value) -> ControlRequest {
    ControlRequest::Set(name.into(), value)
}

fn run(arguments: &[(&str, Value)]) -> ControlRequest {
    let arguments = arguments.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
    ControlRequest::Run("overload".into(), Arguments(arguments))
}

#[test]
fn properties_are_read_and_set() {
    let engine = engine();
    assert_eq!(ask(&engine, ControlRequest::Get("level".into())).unwrap(), HostReply::Value(Value::U64(5)));
    assert_eq!(ask(&engine, set("level", Value::U64(9))).unwrap(), HostReply::Done);
    assert_eq!(ask(&engine, ControlRequest::Get("level".into())).unwrap(), HostReply::Value(Value::U64(9)));
    let refused = ask(&engine, set("colour", Value::Text("blue".into()))).unwrap_err();
    assert_eq!(refused.to_string(), "the lamp has one colour only");
}

#[test]
fn what_does_not_fit_the_list_never_reaches_the_device() {
    let engine = engine();
    let text = |text: &str| Value::Text(text.into());
    let refused = [
        (ControlRequest::Get("lever".into()), "there is no property \"lever\""),
        (set("lever", Value::U64(1)), "there is no property \"lever\""),
        (set("serial", text("x")), "the property \"serial\" cannot be set"),
        (set("level", Value::U64(0)), "\"level\" must be a number from 1 to 9"),
        (set("level", Value::U64(10)), "\"level\" must be a number from 1 to 9"),
        (set("level", Value::Bool(true)), "\"level\" must be a number from 1 to 9"),
        (set("colour", text("green")), "\"colour\" must be one of red, blue"),
        (ControlRequest::Run("explode".into(), Arguments::default()), "there is no command \"explode\""),
        (run(&[]), "the command needs an argument \"watts\""),
        (run(&[("watts", text("9"))]), "\"watts\" must be a number"),
        (run(&[("watts", Value::U64(9)), ("volts", Value::U64(9))]), "the command has no argument \"volts\""),
        (run(&[("watts", Value::U64(9)), ("watts", Value::U64(8))]), "the argument \"watts\" is given twice"),
        (
            run(&[("watts", Value::U64(9)), ("note", text("123456789"))]),
            "\"note\" must be text of up to 8 bytes",
        ),
    ];
    for (request, why) in refused {
        assert_eq!(ask(&engine, request.clone()).unwrap_err().to_string(), why, "{request:?}");
    }
    let entered = ask(&engine, ControlRequest::Get("entered".into())).unwrap();
    assert_eq!(entered, HostReply::Value(Value::U64(1)), "this request is the first that it hears of");
}

#[test]
fn policy_5_a_device_that_panics_in_a_request_needs_a_reset_and_the_caller_goes_on() {
    let engine = engine();
    let error = ask(&engine, run(&[("watts", Value::U64(2000))])).unwrap_err();
    assert!(matches!(error, HostError::Panicked), "{error}");
    assert!(engine.status().contains(Status::DEVICE_NEEDS_RESET));
    assert_eq!(ask(&engine, ControlRequest::Get("level".into())).unwrap(), HostReply::Value(Value::U64(5)));
}

#[test]
fn the_list_is_all_that_tools_need_for_their_help() {
    let engine = engine();
    let level = engine.controls().property("level").unwrap();
    assert!(level.settable);
    assert_eq!((level.kind.to_string(), &*level.help), ("a number from 1 to 9".into(), "brightness"));
    let command = engine.controls().command("overload").unwrap();
    let names: Vec<_> =
        command.arguments.iter().map(|argument| (&*argument.name, argument.required)).collect();
    assert_eq!(names, [("watts", true), ("note", false)]);
}
